"""The runtime's operations against coremltools' definitions, and against what the docs say."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import pytest
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops import OPS

OPSETS = (ct.target.iOS15, ct.target.iOS16, ct.target.iOS17, ct.target.iOS18)
DOCUMENT = Path(__file__).parents[3] / "docs" / "ops.md"

DEFINITIONS = {
    (name, opset): versions[opset]
    for name, versions in SSAOpRegistry.core_ops.items()
    for opset in OPSETS
    if opset in versions
}
NAMES = {name for name, _ in DEFINITIONS}

# Type combinations that a definition admits and the runtime refuses, each said in the docs.
REFUSED = {
    "real_div": lambda dtypes: dtypes["x"] == "int32",
    "matmul": lambda dtypes: dtypes["x"] != dtypes["y"],
}


def section(title: str) -> dict[str, str]:
    """Return what a table of the docs says: operation to the rest of its row."""
    text = DOCUMENT.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for row in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
        left, right = (cell.strip() for cell in row.strip("|").split("|"))
        names, rest = (right, left.strip("`")) if title == "Computed" else (left, right)
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found, f"{name} is listed twice"
            found[name] = rest
    return found


def test_every_operation_is_computed_or_left_out_with_a_reason() -> None:
    computed, compiled, left_out = (
        section(title) for title in ("Computed", "Handled when a program is compiled", "Left out")
    )
    assert len(computed) + len(compiled) + len(left_out) == len(
        {*computed, *compiled, *left_out}
    ), "an operation is listed twice"
    assert {*computed, *compiled, *left_out} == NAMES
    assert set(computed) == set(OPS) & NAMES
    assert all(len(reason) > 10 for reason in (*compiled.values(), *left_out.values()))


def test_the_docs_name_the_right_files() -> None:
    for name, file in section("Computed").items():
        assert OPS[name].function.__module__ == f"llm_coreml.reference.ops.{file}", name


def test_no_operation_is_made_up() -> None:
    assert set(OPS) <= NAMES


@pytest.mark.parametrize("name", sorted(set(OPS) & NAMES))
def test_parameters_are_those_of_every_opset(name: str) -> None:
    versions = {
        opset: definition.input_spec.input_types
        for (other, opset), definition in DEFINITIONS.items()
        if other == name
    }
    assert set(OPS[name].parameters) == {key for spec in versions.values() for key in spec}
    for opset, spec in versions.items():
        optional = {key for key, kind in spec.items() if kind.optional}
        assert not optional & OPS[name].required, (opset, "an optional parameter is required")


def combinations(definition: Any) -> Iterator[dict[str, str]]:
    """Yield the element types of the tensors, as the definition's type letters admit them."""
    letters = getattr(definition, "type_domains", {})
    for chosen in itertools.product(*letters.values()):
        bound = dict(zip(letters, chosen, strict=True))
        dtypes = {}
        for key, kind in definition.input_spec.input_types.items():
            if OPS[definition.__name__].parameters[key] in ("tensor", "tensors", "dynamic"):
                domain = getattr(kind, "type_domain", None) or (types.fp32,)
                letter = getattr(kind, "type_domain_id", None)
                dtypes[key] = types.builtin_to_string(bound.get(letter, domain[0]))
        yield dtypes


@pytest.mark.parametrize("name", sorted(set(OPS) & NAMES))
def test_every_element_type_is_admitted(name: str) -> None:
    named = {"dtype": "fp32", "output_dtype": "int8"}
    for opset in OPSETS:
        if (name, opset) not in DEFINITIONS:
            continue
        for dtypes in combinations(DEFINITIONS[name, opset]):
            if name in REFUSED and REFUSED[name](dtypes):
                with pytest.raises(ArtifactError):
                    OPS[name].result(dtypes, named)
            else:
                assert OPS[name].result(dtypes, named), dtypes


def test_a_row_of_the_docs_that_lies_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, "gather")
    with pytest.raises(AssertionError):
        test_every_operation_is_computed_or_left_out_with_a_reason()
