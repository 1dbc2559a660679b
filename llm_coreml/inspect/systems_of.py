"""Which systems run a program, from what it declares and from what it uses.

    systems_of(Path("out"))[0].asked.declared           # 'iOS18'
    check_system(Path("out"), "iOS17")                  # UnsupportedError, and what to do

It tells of any `.pte` or `.mlpackage`, whoever exported it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_coreml.artifact import pte
from llm_coreml.artifact.compatibility import MIXED_ADVICE, Compatibility, compatibility
from llm_coreml.artifact.packages import BACKEND, Packages, model_of_folder
from llm_coreml.bundle.folder import program_at
from llm_coreml.errors import ArtifactError, UnsupportedError
from llm_coreml.systems import BY_NAME, SYSTEMS, opset_of


@dataclass(frozen=True)
class PartSystems:
    """What a part of a program asks of a system.

    Attributes:
        part: The method and partition that run it; the name of a `.mlpackage`.
        asked: What its model asks.
    """

    part: str
    asked: Compatibility

    def to_json(self) -> dict[str, Any]:
        """Return one object of all fields."""
        return {"part": self.part, **asdict(self.asked)}


def systems_of(path: Path, checked: bool = True) -> tuple[PartSystems, ...]:
    """Return what each Core ML model of a bundle, `.pte` or `.mlpackage` asks of a system.

    Args:
        path: Where it is.
        checked: Refuse a bundle whose files have changed since the export wrote them.

    Raises:
        ArtifactError: it is damaged, or holds no Core ML model.
    """
    program = program_at(path, checked)
    if program.is_dir():
        return (PartSystems(path.name, compatibility(model_of_folder(program))),)
    container = pte.read(program)
    packages = Packages(container)
    found: list[PartSystems] = []
    for name, method in container.methods.items():
        ours = [each for each in method.delegates if each.backend == BACKEND]
        for number, delegate in enumerate(ours):
            asked = compatibility(packages.open(delegate).package.model)
            found.append(PartSystems(f"{name}, partition {number}", asked))
    if not found:
        raise ArtifactError(
            f"'{path}' holds no Core ML model, so that no system of Apple's is asked for anything."
        )
    return tuple(found)


def check_system(path: Path, minimum_os: str, checked: bool = True) -> tuple[PartSystems, ...]:
    """Return what `systems_of` returns, of a program that a system runs.

    Args:
        path: Bundle, `.pte` or `.mlpackage`.
        minimum_os: The system, by any of its names.
        checked: As in `systems_of`.

    Raises:
        UnsupportedError: the system refuses it; the message says why, and what to export.
        ArtifactError: as `systems_of`.
    """
    # Programs of others may be for iOS15.
    known = BY_NAME.get(minimum_os)
    system = opset_of(minimum_os) if known is None else known.name
    found = systems_of(path, checked)
    for part in found:
        if refusal := _refusal(part.asked, system):
            where = f"'{path}' ({part.part})"
            raise UnsupportedError(f"{where} does not run on {minimum_os}: {refusal}")
    return found


def _refusal(asked: Compatibility, system: str) -> str:
    """Return why a system refuses a model, and what to do; "" if it does not."""
    if asked.mixed:
        told = "; ".join(map(str, asked.mixed[:3]))
        return f"no system compiles {told}. {MIXED_ADVICE}"
    lacking = asked.newer_than(system)
    declared = BY_NAME.get(asked.declared)
    told = ""
    if declared is None or declared.specification > BY_NAME[system].specification:
        opsets = " and ".join(asked.opsets)
        told = (
            f"it is written for {asked.declared or 'a newer system'} (version "
            f"{asked.specification} of the model format, operations of {opsets}), of which "
            f"{system} says: unknown opset; "
        )
        if not lacking:
            return f"{told}nothing in it needs that; export it with --minimum-os {system}."
    if not lacking:
        return ""
    least = asked.needed or SYSTEMS[-1].name
    stateless = " or without states" if any(need.what == "a state" for need in lacking) else ""
    more = f" and {len(lacking) - 4} more" if lacking[4:] else ""
    return (
        f"{told}it uses {', '.join(map(str, lacking[:4]))}{more}; export it with --minimum-os "
        f"{least}{stateless}."
    )


def systems_json(parts: Iterable[PartSystems]) -> Mapping[str, Any]:
    """Return what `systems_of` found, for machines."""
    return {"parts": [part.to_json() for part in parts]}
