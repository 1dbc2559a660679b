"""The file of a sweep, read strictly.

    sweep = read_sweep(Path("sweep.yaml"))

It is YAML, with settings by their plain names:

    models: [llama, ./my-finetune]
    targets: [gpu, ane]
    axes: {bits: [3, 4], calibrate: [null, bundled]}
    settings: {context: 512}
    exclude: [{bits: 4, target: ane}]
    evaluate: {tokens: 1024}
    limits: {memory: 8GB, minutes: 60}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm_coreml.config import SECTIONS
from llm_coreml.config.plain_yaml import read_yaml
from llm_coreml.config.schema import complaint, sections_schema
from llm_coreml.config.setting import Section, setting
from llm_coreml.config.values import MOST_BYTES, read_bytes
from llm_coreml.errors import ConfigError, LlmCoreMLError

Values = Mapping[str, Any]
# A sweep may take days; a cell that takes half of one hangs.
DEFAULT_MINUTES = 720.0


@dataclass(frozen=True)
class Measured(Section):
    """How each cell is measured; the options of `llm-coreml eval`."""

    text: str | None = setting(None, "UTF-8 file; else the bundled text.")
    tokens: int = setting(2048, "Most tokens to score.", least=1)
    artifact_only: bool = setting(False, "Leave out the original.")
    mode: Literal["declared", "fp32", "strict-fp16"] = setting("declared", "Numerics.")
    device: str = setting("cpu", "Where to compute.")


@dataclass(frozen=True)
class Limits(Section):
    """What each cell may take."""

    memory: int | None = setting(
        None, "Bytes, such as 8GB.", least=1 << 20, most=MOST_BYTES, read=read_bytes
    )
    minutes: float = setting(DEFAULT_MINUTES, "Minutes by the clock.")
    cores: int | None = setting(None, "Processor cores.", least=1, most=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.minutes <= 1e6:
            raise ConfigError(
                f"minutes is {self.minutes}; it must be more than 0, and 1e6 at most."
            )


@dataclass(frozen=True)
class Sweep:
    """What a sweep asks for.

    Attributes:
        name: Of its file, without the ending.
        models: Recipes, hub ids, folders or `.gguf` files.
        formats: Settings that belong together; one empty entry where there are none.
        axes: Values by setting, targets among them.
        settings: The same for every cell.
        exclude: Which cells to leave out: `model` and settings that they have.
        measured: How to measure.
        limits: What a cell may take.
    """

    name: str
    models: tuple[str, ...]
    formats: tuple[Values, ...] = ({},)
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: Values = field(default_factory=dict)
    exclude: tuple[Values, ...] = ()
    measured: Measured = Measured()
    limits: Limits = Limits()


def read_sweep(path: Path) -> Sweep:
    """Read the file of a sweep.

    Raises:
        ConfigError: it cannot be read, has an unknown key, an empty axis, a value twice, or a
            setting in two places.
    """
    values = read_yaml(path, "Sweep")
    try:
        wrong = complaint(values, sweep_schema())
        if wrong is not None:
            raise ConfigError(wrong)
        return _sweep(path.stem, values)
    except LlmCoreMLError as error:
        raise type(error)(f"Sweep '{path}': {error}") from None


def sweep_schema() -> dict[str, Any]:
    """Return the JSON schema of the file, made from the fields of the settings."""
    settings = {
        name: described
        for section in sections_schema(SECTIONS)["properties"].values()
        for name, described in section["properties"].items()
    }
    own = sections_schema({"evaluate": Measured, "limits": Limits})["properties"]
    text = {"type": "string"}
    named = {"type": "string", "minLength": 1}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["models"],
        "properties": {
            "description": text,
            "models": _many(named),
            "formats": _many(_object(settings)),
            "targets": _many(named),
            "axes": _object({name: _many(described) for name, described in settings.items()}),
            "settings": _object(settings),
            "exclude": _many(_object({"model": named, **settings})),
            **own,
        },
    }


def _many(items: Values) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _object(properties: Values) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _sweep(name: str, values: Values) -> Sweep:
    axes = {f"axes.{key}": each for key, each in values.get("axes", {}).items()}
    lists = {key: values[key] for key in ("models", "formats", "targets") if key in values}
    for where, given in {**lists, **axes}.items():
        _check_list(where, given)
    _check_places(values)
    targets = {"target": values["targets"]} if "targets" in values else {}
    return Sweep(
        name=name,
        models=tuple(values["models"]),
        formats=tuple(values.get("formats", ({},))),
        axes={key: tuple(each) for key, each in {**values.get("axes", {}), **targets}.items()},
        settings=values.get("settings", {}),
        exclude=tuple(values.get("exclude", ())),
        measured=Measured(**values.get("evaluate", {})),
        limits=_limits(values.get("limits", {})),
    )


def _limits(values: Values) -> Limits:
    memory = values.get("memory")
    try:
        read = {"memory": read_bytes(memory)} if isinstance(memory, str) else {}
    except ValueError as error:
        raise ConfigError(f"limits.memory: {error}") from None
    return Limits(**{**values, **read})


def _check_list(where: str, given: Sequence[Any]) -> None:
    """Refuse a list of nothing, and one that names something twice."""
    if not given:
        raise ConfigError(f"{where} is empty; give at least one value, or leave it out.")
    for at, value in enumerate(given):
        if value in given[:at]:
            raise ConfigError(f"{where} names {_shown(value)} twice; name each once.")


def _check_places(values: Values) -> None:
    """Refuse a setting that two places decide."""
    places: dict[str, str] = {"target": "targets"} if "targets" in values else {}
    for place, names in _placed(values):
        for name in names:
            if name in places:
                raise ConfigError(
                    f"{name} is in {places[name]} and in {place}; give it in one of them."
                )
        places |= dict.fromkeys(names, place)


def _placed(values: Values) -> Iterable[tuple[str, Sequence[str]]]:
    yield "axes", list(values.get("axes", {}))
    yield "settings", list(values.get("settings", {}))
    yield "formats", list({name for each in values.get("formats", ()) for name in each})


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items()) or "no settings"
    return "null" if value is None else str(value)
