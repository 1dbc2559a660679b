"""Write which system has which Core ML operation, from coremltools' own registry.

    python scripts/opsets.py table > llm_coreml/artifact/opsets.json
    python scripts/opsets.py page > docs/compatibility.md

A version of an operation is told by what it takes: parameters, the element types of each, and which
of them must be of one type.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from llm_coreml.artifact.opsets import operations
from llm_coreml.systems import SYSTEMS

_OLDEST = SYSTEMS[0].name
_HEAD = """# Compatibility

Which of Apple's systems runs what. `python scripts/opsets.py page` writes this page from the
operations that coremltools {version} defines, and a test compares it with them.

A program says which version of the model format it is in and which set of operations it uses; a
system refuses what is newer than itself, whatever the program does with it (`unknown opset
'CoreML8'`). An export is written in those of `--minimum-os`, any name of the table. An operation
that the system does not have is an error at export, which names it, the layer, and the system that
has it. `llm-coreml inspect OUT --compatibility` tells what a program is written for, the oldest
system that has all that it uses, and what asks for that; with `--minimum-os iOS17` it refuses what
that system does not run. It reads a `.pte` or `.mlpackage` of any exporter.

## Systems

| `--minimum-os` | the same year's | model format | operations |
|---|---|---|---|
{systems}

`iOS15` is there for programs of others; exports begin with iOS16, and those with a KV cache as
state with iOS18.

## What begins with a system

| from | what |
|---|---|
{features}

## Operations

**x** has it; **+** has a version that takes more: other parameters, other element types, or types
that differ. iOS26 adds none that coremltools knows.
"""
_FEATURES = {
    "iOS16": (
        "fp16 inputs and outputs",
        "int8 per channel",
        "one palette of 1, 2, 4, 6 or 8 bits for a whole matrix",
    ),
    "iOS17": (
        "numbers of 8 and 16 bits in most operations",
        "quantized activations",
        "factors of two element types",
    ),
    "iOS18": (
        "states, and so a KV cache that stays in Core ML",
        "several functions in a model",
        "several inputs of enumerated shapes",
        "int4, scales per group, palettes per group of rows, and of 3 bits",
        "attention as one operation",
    ),
    "iOS26": ("scales on what a table gives, see [formats](formats.md)", "int8 inputs and outputs"),
}


def table() -> dict[str, Any]:
    """Return every operation's versions, by the first system that has each."""
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    found: dict[str, Any] = {}
    for name, versions in sorted(SSAOpRegistry.core_ops.items()):
        kept: dict[str, Any] = {}
        previous = None
        for target in sorted(versions):
            # ML Programs know none of the systems before.
            system = target.name if target.name in {each.name for each in SYSTEMS} else _OLDEST
            if versions[target] is not previous:
                kept[system] = _parameters(versions[target])
            previous = versions[target]
        found[name] = kept
    return found


def _parameters(definition: Any) -> dict[str, str]:
    from coremltools.converters.mil.mil import types

    found = {}
    for name, given in definition.input_spec.input_types.items():
        group = getattr(given, "type_domain_id", None) or ""
        domain = definition.type_domains[group] if group else getattr(given, "type_domain", ())
        words = sorted(types.builtin_to_string(each) for each in _listed(domain))
        found[name] = f"{group}: {' '.join(words)}".strip(": ") if words else ""
    return found


def _listed(domain: Any) -> list[Any]:
    return list(domain) if isinstance(domain, (tuple, list, set, frozenset)) else [domain]


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    import coremltools

    rows = (
        f"| `{system.name}` | {', '.join(f'`{name}`' for name in system.others)} "
        f"| {system.specification} | `{system.opset}` |"
        for system in SYSTEMS
    )
    features = (f"| {name} | {'; '.join(told)} |" for name, told in _FEATURES.items())
    yield _HEAD.format(
        version=coremltools.__version__, systems="\n".join(rows), features="\n".join(features)
    )
    names = [system.name for system in SYSTEMS]
    yield f"| operation | {' | '.join(names)} |"
    yield "|---|" + len(names) * "---|"
    for name, versions in operations().items():
        begun, cells = False, []
        for system in names:
            new = system in versions
            cells.append(("+" if begun else "x") if new else "x" if begun else "")
            begun |= new
        yield f"| `{name}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(json.dumps(table(), indent=1, sort_keys=True))
    else:
        print("\n".join(page()))
