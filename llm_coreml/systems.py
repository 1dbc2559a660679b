"""Apple's systems, by what their Core ML reads.

    system = system_of("macOS15")
    system.name, system.specification, system.opset        # 'iOS18', 9, 'CoreML8'

A program says of itself which version of the model format it is written in, and which set of
operations its functions use; a system refuses what is newer than itself. Systems of one year read
the same, and go by the name of iOS here, as in coremltools.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from llm_coreml.errors import ConfigError, UnsupportedError, nearest


@dataclass(frozen=True)
class System:
    """The systems of one year.

    Attributes:
        name: coremltools' name of what they bring, `iOS18`.
        specification: The newest version of Core ML's model format that they read.
        opset: What a program calls the newest set of operations that they have.
        others: The other systems of that year.
    """

    name: str
    specification: int
    opset: str
    others: tuple[str, ...]


# ML Programs, which ExecuTorch's backend writes, begin with iOS15; ascending.
SYSTEMS = (
    System("iOS15", 6, "CoreML5", ("macOS12", "watchOS8", "tvOS15")),
    System("iOS16", 7, "CoreML6", ("macOS13", "watchOS9", "tvOS16")),
    System("iOS17", 8, "CoreML7", ("macOS14", "watchOS10", "tvOS17", "visionOS1")),
    System("iOS18", 9, "CoreML8", ("macOS15", "watchOS11", "tvOS18", "visionOS2")),
    System("iOS26", 10, "CoreML9", ("macOS26", "watchOS26", "tvOS26", "visionOS26")),
)
BY_NAME: Mapping[str, System] = MappingProxyType(
    {name: system for system in SYSTEMS for name in (system.name, *system.others)}
)
# The first whose Core ML keeps a state between calls.
STATE_SYSTEM = "iOS18"
# Those that an export may be for; the first of them reads int8 per channel and palettes.
MINIMUM_OS: Mapping[str, str] = MappingProxyType(
    {name: system.name for name, system in BY_NAME.items() if system.name != "iOS15"}
)
_TOO_OLD = (
    *(f"iOS{n}" for n in range(13, 16)),
    *(f"macOS{n}" for n in range(10, 13)),
    *(f"watchOS{n}" for n in range(6, 9)),
    *(f"tvOS{n}" for n in range(13, 16)),
)


def opset_of(minimum_os: str) -> str:
    """Return coremltools' name of what `minimum_os` brings, `iOS16` to `iOS26`.

    Raises:
        UnsupportedError: a system that cannot hold weights of 8 bits.
        ConfigError: no such system.
    """
    if minimum_os in MINIMUM_OS:
        return MINIMUM_OS[minimum_os]
    if minimum_os in _TOO_OLD:
        raise UnsupportedError(
            f"{minimum_os} is too old: Core ML takes fp16 inputs and weights of 8 bits from iOS16 "
            "and macOS13 on, and keeps a KV cache as state from iOS18 and macOS15 on; use "
            "--minimum-os iOS18."
        )
    raise ConfigError(
        f"There is no OS '{minimum_os}'; known are {', '.join(MINIMUM_OS)}."
        + nearest(minimum_os, MINIMUM_OS)
    )


def older(one: str, other: str) -> bool:
    """Say whether what one system brings is older than what another does; both `iOS..` names."""
    return BY_NAME[one].specification < BY_NAME[other].specification


def of_specification(version: int) -> System | None:
    """Return the oldest systems that read a version of the model format; None if all are older."""
    return next((system for system in SYSTEMS if system.specification >= version), None)
