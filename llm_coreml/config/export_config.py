"""What an export is asked to do: one frozen object from the command line to the manifest.

config = ExportConfig(bits=4, target="gpu", context=2048)
config.to_json()                     # {"weights": {"bits": 4, ...}, "calibration": ..., ...}
config.flags()                       # ["--bits", "4", "--context", "2048"]
config.section(WeightSettings)       # its part that says what weights are stored as
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from llm_coreml.config.calibration_settings import CalibrationSettings
from llm_coreml.config.engine import EngineSettings
from llm_coreml.config.schema import complaint, sections_schema
from llm_coreml.config.scheme_text import plain_name
from llm_coreml.config.sections import (
    SECTIONS,
    ProgramSettings,
    SourceSettings,
    TargetSettings,
    WeightSettings,
    decided_by,
    undecided,
)
from llm_coreml.config.setting import Section, settings_of
from llm_coreml.config.values import takes_bits
from llm_coreml.errors import ConfigError, nearest
from llm_coreml.targets import BACKENDS

S = TypeVar("S", bound=Section)


# A dataclass has the fields of its last base first, so these are in the order of SECTIONS.
@dataclass(frozen=True)
class ExportConfig(
    EngineSettings,
    TargetSettings,
    ProgramSettings,
    CalibrationSettings,
    WeightSettings,
    SourceSettings,
):
    """Every setting of an export: the sections' fields together, see `sections`.

    Raises:
        ConfigError: a value breaks a rule of its own, or contradicts another; rules between model
            and settings are checked where both are known.
        UnsupportedError: `minimum_os` is too old.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and BACKENDS[self.backend].stores_dense:
            raise ConfigError(
                f"--size counts quantized weights, and --backend {self.backend} stores fp32; give "
                "--bits."
            )
        self._check_pt2e()

    def _check_pt2e(self) -> None:
        """Refuse a text that is not read, the lack of one that is, and steps that follow codes."""
        if self.pt2e == "weights" and self.calibrate is not None:
            raise ConfigError(
                "--pt2e weights reads no text, which --calibrate gives; drop one of them."
            )
        if self.pt2e == "static" and self.calibrate is None:
            raise ConfigError(
                "--pt2e static reads a text for the ranges of activations; give --calibrate "
                "bundled, or a file."
            )
        if self.pt2e == "static" and BACKENDS[self.backend].stores_dense:
            raise ConfigError(
                f"--pt2e static rounds activations, which --backend {self.backend} keeps as fp32; "
                "give --pt2e weights."
            )
        if self.pt2e == "static" and self.tune:
            raise ConfigError("--tune changes what --pt2e static has measured; drop one of them.")

    def section(self, kind: type[S]) -> S:
        """Return the settings of one section."""
        return kind(**{each.name: getattr(self, each.name) for each in settings_of(kind)})

    def under(self, given: Mapping[str, Any]) -> ExportConfig:
        """Return these settings, as of a recipe, below those that were given.

        Formats that contradict a given `bits`, `scheme`, `size`, `plan` or `pt2e` go back to
        their defaults; contradictions among the given remain.

        Raises:
            ConfigError: as for any config.
            UnsupportedError: as for any config.
        """
        settings = {each.name: each for each in settings_of(ExportConfig)}
        given = {
            name: settings[name].in_words(value) if name in settings else value
            for name, value in given.items()
        }
        cleared = {
            other: undecided(name, other, getattr(self, other)) or settings[other].default
            for name in {"bits", "scheme", "size", "plan", "pt2e"} & given.keys()
            for other in self._contradicted(name, given[name])
            if other not in given
        }
        return replace(self, **cleared, **given)

    def _contradicted(self, name: str, value: Any) -> Iterator[str]:
        """Yield the settings that cannot stay beside another one of this value."""
        yield from decided_by(name, value)
        yield from (
            each for each in ("size", "plan", "bits", "pt2e") if name in self._decided(each)
        )
        if name == "bits" and not _takes_bits(self.scheme, value):
            yield "scheme"
        if name == "scheme" and not _takes_bits(value, self.bits):
            yield "bits"

    def _decided(self, name: str) -> tuple[str, ...]:
        return decided_by(name, getattr(self, name))

    def flags(self) -> list[str]:
        """Return the words that give these settings on the command line, defaults left out."""
        return [
            word
            for each in settings_of(ExportConfig)
            for word in each.words(getattr(self, each.name))
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the settings by section and name, as JSON values."""
        return {title: asdict(self.section(kind)) for title, kind in SECTIONS.items()}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ExportConfig:
        """Build a config from `to_json` output, from a recipe's sections, or without sections.

        Manifests of the first releases have none.

        Raises:
            ConfigError: an unknown key, or a value that the setting cannot have.
            UnsupportedError: `minimum_os` is too old.
        """
        found = values if _has_sections(values) else _sectioned(values)
        wrong = complaint(found, sections_schema(SECTIONS))
        if wrong is not None:
            raise ConfigError(wrong)
        settings = {each.name: each for each in settings_of(cls)}
        try:
            given = {
                name: settings[name].parsed(value)
                for section in found.values()
                for name, value in section.items()
            }
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return cls(**given)


def _takes_bits(scheme: str | None, bits: float | None) -> bool:
    """Return whether a scheme, none at all or one of patterns alone, goes with bits."""
    plain = plain_name(scheme)
    return plain is None or bits is None or takes_bits(plain, bits)


def _has_sections(values: Mapping[str, Any]) -> bool:
    """Return whether settings lie in sections.

    A section and a setting may share a name: `target`, which is a section if it holds keys. The
    setting `scheme` may hold a mapping of its own.
    """
    settings = {each.name for each in settings_of(ExportConfig)}
    mappings = {each.name for each in settings_of(ExportConfig) if each.mapping}
    sections = SECTIONS.keys() - settings
    return any(
        key in sections or (isinstance(value, Mapping) and key not in mappings)
        for key, value in values.items()
    )


def _sectioned(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Put settings into their sections."""
    homes = {each.name: title for title, kind in SECTIONS.items() for each in settings_of(kind)}
    found: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in homes:
            raise ConfigError(f"There is no setting '{name}'.{nearest(name, homes)}")
        found.setdefault(homes[name], {})[name] = value
    return found
