"""The cells of a sweep: every model in every format, with every value of every axis.

for cell in cells_of(read_sweep(Path("sweep.yaml"))):
    print(cell.label)                       # "llama bits 4 calibrate bundled"
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llm_coreml.config import ExportConfig
from llm_coreml.config.setting import Setting, settings_of
from llm_coreml.errors import ConfigError, LlmCoreMLError
from llm_coreml.eval.sweep.sweep_file import Sweep, Values
from llm_coreml.recipes import find_recipe

# More is a slip of the pen.
MOST = 10_000
_LONGEST = 80


@dataclass(frozen=True)
class Cell:
    """An export to make and to measure.

    Attributes:
        label: What it is called in its sweep: the model, and what differs between cells.
        model: Recipe, hub id, folder or `.gguf` file.
        config: Its settings.
    """

    label: str
    model: str
    config: ExportConfig

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.label)[:_LONGEST].strip("-.") or "cell"


def cells_of(sweep: Sweep) -> tuple[Cell, ...]:
    """Return the cells of a sweep, in the order of its file.

    Raises:
        ConfigError: settings of a cell contradict each other, an exclusion fits no cell or all of
            them, or there are too many.
        UnsupportedError: a cell asks for what is understood and refused.
    """
    count = len(sweep.models) * len(sweep.formats) * math.prod(map(len, sweep.axes.values()))
    if count > MOST:
        raise ConfigError(
            f"Sweep '{sweep.name}' has {count:,} cells, and {MOST:,} is the most; make it smaller."
        )
    exclude = [_normal(each) for each in sweep.exclude]
    fitted = [0] * len(exclude)
    cells = []
    for model, base, own in _products(sweep):
        label = _label(sweep, model, own)
        given = _of_cell(sweep, label, {**sweep.settings, **own})
        values = {**_flat(base), **given, "model": model}
        fits = [all(values[name] == each[name] for name in each) for each in exclude]
        fitted = [count + fit for count, fit in zip(fitted, fits, strict=True)]
        if not any(fits):
            cells.append(Cell(label, model, _config(sweep, label, base, given)))
    for number, times in enumerate(fitted, 1):
        if not times:
            raise ConfigError(
                f"Sweep '{sweep.name}': entry {number} of exclude fits no cell; correct it, or "
                "take it out."
            )
    if not cells:
        raise ConfigError(f"Sweep '{sweep.name}': exclude leaves no cell; take an entry out.")
    return tuple(cells)


def _products(sweep: Sweep) -> Iterator[tuple[str, ExportConfig, dict[str, Any]]]:
    """Yield the model, its recipe's settings and the cell's own ones of each cell."""
    for model in sweep.models:
        recipe = find_recipe(model)
        base = ExportConfig() if recipe is None else recipe.config
        for given, *values in itertools.product(sweep.formats, *sweep.axes.values()):
            yield model, base, {**given, **dict(zip(sweep.axes, values, strict=True))}


def _label(sweep: Sweep, model: str, own: Values) -> str:
    """Return a model's short name, and those of its settings that differ between cells."""
    name = Path(model).name or model
    if sum(Path(each).name == name for each in sweep.models) > 1:
        name = model
    varying = {axis for axis, values in sweep.axes.items() if len(values) > 1}
    if len(sweep.formats) > 1:
        varying |= {axis for each in sweep.formats for axis in each}
    told = [f"{axis} {_shown(value)}" for axis, value in own.items() if axis in varying]
    return " ".join([name, *told])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={each}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _of_cell(sweep: Sweep, label: str, given: Values) -> dict[str, Any]:
    try:
        return _normal(given)
    except LlmCoreMLError as error:
        raise type(error)(f"Sweep '{sweep.name}', cell '{label}': {error}") from None


def _normal(given: Values) -> dict[str, Any]:
    """Return settings as a config keeps them, so that equal ones are equal."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        found[name] = value if name == "model" else _read(_SETTINGS[name], value)
    return found


def _read(setting: Setting, value: Any) -> Any:
    try:
        return setting.checked(setting.parsed(value))
    except ValueError as error:
        raise ConfigError(f"{setting.name}: {error}") from None


def _config(sweep: Sweep, label: str, base: ExportConfig, given: Values) -> ExportConfig:
    try:
        return base.under(given)
    except LlmCoreMLError as error:
        raise type(error)(f"Sweep '{sweep.name}', cell '{label}': {error}") from None


def _flat(config: ExportConfig) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in fields(config)}


_SETTINGS = {each.name: each for each in settings_of(ExportConfig)}
