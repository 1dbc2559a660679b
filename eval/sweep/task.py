"""A cell as work for another process, and what came of it; both go as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Module and function that a cell's process runs.
CELL = ("llm_coreml.eval.sweep.one_cell", "run")

# Told which share of its work a cell has done.
Heard = Callable[[float], object]


@dataclass(frozen=True)
class Task:
    """A cell, ready to be tried anywhere.

    Attributes:
        key: Hash of all that its figures follow from.
        label: What it is called in its sweep.
        slug: The label as the name of a folder.
        model: What to export.
        settings: Of the export, as `ExportConfig.to_json`.
        measured: Of the evaluation, by the names of `Measured`.
        weights: Hash of the model's stored tensors.
        tool: Version of this package.
        folder: Where drafts belong; where there is none, temporary files do.
        keep: Folder that is to hold the bundle; None drops it.
        cache: Folder of quantized weights; True takes the default, False keeps none.
        memory: Bytes that it may take; None is all of the machine.
        seconds: By the clock, that it may take.
        cores: Processor cores that it may count on; None does not bound them.
        entry: Module and function that its process runs.
    """

    key: str
    label: str
    slug: str
    model: str
    settings: Mapping[str, Any]
    measured: Mapping[str, Any]
    weights: str
    tool: str
    folder: str
    keep: str | None = None
    cache: str | bool = True
    memory: int | None = None
    seconds: float = 3600.0
    cores: int | None = None
    entry: tuple[str, str] = CELL

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    Attributes:
        state: Whether it was measured.
        document: Its results, as `results.json` holds them; None if it failed.
        sentence: Why it failed, empty if it did not.
        exit_code: What the command line would have ended with.
        seconds: How long it took.
        peak_memory_bytes: The most that its process held; None if it did not come to tell.
    """

    state: Literal["done", "failed"]
    document: Mapping[str, Any] | None = None
    sentence: str = ""
    exit_code: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None


def failed(sentence: str, exit_code: int, seconds: float) -> Outcome:
    """Return the outcome of a cell that failed."""
    return Outcome("failed", None, sentence, exit_code, seconds)
