"""What a cell is known by: a hash of all that its figures follow from.

The weights, the tokenizer, the settings with the content of the files that they name, the text with
how it is read, and the version of this package. Names of files and folders are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llm_coreml.bundle.seal import file_sha256
from llm_coreml.config import ExportConfig
from llm_coreml.config.setting import settings_of
from llm_coreml.errors import ConfigError
from llm_coreml.eval.heldout import read_text
from llm_coreml.eval.results import RESULTS_VERSION
from llm_coreml.eval.surroundings import this_tool
from llm_coreml.eval.sweep.grid import Cell
from llm_coreml.eval.sweep.sweep_file import Measured, Sweep
from llm_coreml.eval.sweep.task import Task
from llm_coreml.model import Model, open_model
from llm_coreml.quantize.calibrate.text import BUNDLED_TEXT, read_content
from llm_coreml.quantize.kept_codes import kept_program
from llm_coreml.recipes import find_recipe, recipe_names


def tasks_of(
    sweep: Sweep,
    cells: Sequence[Cell],
    folder: Path,
    heard: Callable[[float], object] = lambda _: None,
) -> tuple[Task, ...]:
    """Return cells as tasks with their keys; every model is opened and hashed for it.

    Args:
        sweep: How to measure, and what a cell may take.
        cells: Its cells.
        folder: Where drafts belong.
        heard: Told which share of the models is hashed.

    Raises:
        LlmCoreMLError: a model or a text cannot be read.
    """
    measured, tool = sweep.measured, this_tool().version
    text = None if measured.text is None else _absolute(measured.text)
    common = {"version": [tool, RESULTS_VERSION], "measured": _facts_of_measuring(measured)}
    known: dict[tuple[str, str | None], tuple[str, str]] = {}
    tasks = []
    for number, cell in enumerate(cells):
        which = cell.model, cell.config.family
        if which not in known:
            known[which] = _hashes(open_model(cell.model, family=cell.config.family))
        weights, words = known[which]
        facts = {"weights": weights, "tokenizer": words, "settings": _facts_of_settings(cell)}
        tasks.append(
            Task(
                key=_hash({**common, **facts}),
                label=cell.label,
                slug=cell.slug,
                model=_model(cell.model),
                settings=_settings(cell.config).to_json(),
                measured={**asdict(measured), "text": text},
                weights=weights,
                tool=tool,
                folder=str(folder.absolute()),
                memory=sweep.limits.memory,
                seconds=60 * sweep.limits.minutes,
                cores=sweep.limits.cores,
            )
        )
        heard((number + 1) / len(cells))
    return tuple(tasks)


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hashes(model: Model) -> tuple[str, str]:
    """Return the hashes of a model's tensors, and of what beside them makes its figures."""
    files = {name: file_sha256(path) for name, path in model.checkpoint.tokenizer_files.items()}
    return model.sha256(), _hash({"spec": model.spec.to_json(), "tokenizer": files})


def _facts_of_settings(cell: Cell) -> dict[str, Any]:
    """Return a cell's settings, files among them by what they hold.

    Defaults are left out: a release with a setting more leaves keys as they are.
    """
    defaults = {each.name: each.default for each in settings_of(ExportConfig)}
    settings = {
        name: value for name, value in asdict(cell.config).items() if value != defaults[name]
    }
    if cell.config.calibrate is not None:
        settings["calibrate"] = _hash(read_content(cell.config.calibrate))
    if cell.config.plan is not None:
        try:
            settings["plan"] = file_sha256(Path(cell.config.plan))
        except OSError as error:
            raise ConfigError(
                f"plan '{cell.config.plan}' of cell '{cell.label}' cannot be read: "
                f"{error.strerror}. Give the manifest.json of an export."
            ) from None
    if cell.config.codes_of is not None:
        settings["codes_of"] = kept_program(cell.config.codes_of)
    return settings


def _facts_of_measuring(measured: Measured) -> dict[str, Any]:
    text = None if measured.text is None else Path(measured.text)
    return {**asdict(measured), "text": _hash(read_text(text)[1])}


def _model(name: str) -> str:
    """Return what a cell's process is to export; a recipe of this package keeps its name."""
    shipped = name in recipe_names() and find_recipe(name) is not None
    return name if shipped else _absolute(name)


def _settings(config: ExportConfig) -> ExportConfig:
    """Return settings whose files are found from any folder."""
    text, plan, codes = config.calibrate, config.plan, config.codes_of
    return replace(
        config,
        calibrate=text if text in (None, BUNDLED_TEXT) else _absolute(str(text)),
        plan=None if plan is None else _absolute(plan),
        codes_of=None if codes is None else _absolute(codes),
    )


def _absolute(name: str) -> str:
    """Return the whole path of what is on this disk, anything else as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name
