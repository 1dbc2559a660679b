"""Which system has which operation of Core ML, and what its versions take.

    operations()["gather"]["iOS17"]["indices"].types
    oldest("gather", {"x": "fp16", "indices": "int32", "validate_indices": "bool"})   # 'iOS17'

The table is coremltools' registry, without coremltools: `scripts/opsets.py` writes `opsets.json`,
and a test compares the two.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_coreml.systems import STATE_SYSTEM


@dataclass(frozen=True)
class Parameter:
    """What an operation takes by one name.

    Attributes:
        types: Element types; none where the registry does not tell.
        group: Parameters of one group must be of one type; "" is no group.
    """

    types: frozenset[str]
    group: str


Version = Mapping[str, Parameter]


@functools.cache
def operations() -> Mapping[str, Mapping[str, Version]]:
    """Return every operation's versions by the oldest system that has each, oldest first."""
    read = json.loads(Path(__file__).with_name("opsets.json").read_bytes())
    found = {
        name: {system: _version(given) for system, given in sorted(versions.items())}
        for name, versions in read.items()
    }
    # Only files have it; while coremltools converts, it is an operation of its own.
    written = {"input": Parameter(frozenset(), ""), "data": Parameter(frozenset(), "")}
    return found | {"write_state": {STATE_SYSTEM: written}}


def _version(given: Mapping[str, str]) -> Version:
    found = {}
    for name, told in given.items():
        group, mark, types = told.rpartition(":")
        found[name] = Parameter(frozenset(types.split()), group if mark else "")
    return found


def oldest(operation: str, types: Mapping[str, str]) -> str | None:
    """Return the oldest system that has an operation as it is called; None if none has it.

    Args:
        operation: Its type.
        types: Element types of what it is given, by parameter; "" for what is no tensor.
    """
    versions = operations().get(operation)
    if versions is None:
        return None
    fitting = (system for system, version in versions.items() if _fits(version, types))
    # What no version takes is told where the program is run.
    return next(fitting, next(iter(versions)))


def _fits(version: Version, types: Mapping[str, str]) -> bool:
    return (
        types.keys() <= version.keys()
        and not any(
            each and version[name].types and each not in version[name].types
            for name, each in types.items()
        )
        and not differing(version, types)
    )


def differing(version: Version, types: Mapping[str, str]) -> tuple[str, str] | None:
    """Return two parameters that must be of one type and are not, if there are any."""
    groups: dict[str, str] = {}
    for name, each in sorted(types.items()):
        parameter = version.get(name)
        if each and parameter is not None and parameter.group:
            first = groups.setdefault(parameter.group, name)
            if types[first] != each:
                return first, name
    return None
