"""How the cells of a sweep stand, for people and for machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llm_coreml.eval.compared import FIGURES
from llm_coreml.eval.sweep.task import Outcome
from llm_coreml.plain_table import PlainTable

State = Literal["done", "failed", "missing"]


@dataclass(frozen=True)
class SweptCell:
    """A cell of a sweep, and how it stands.

    Attributes:
        label: What it is called.
        key: Hash of what its figures follow from.
        folder: Where it is kept.
        new: It was tried by this very run.
        outcome: What came of it; None if it was not tried.
    """

    label: str
    key: str
    folder: str
    new: bool
    outcome: Outcome | None

    @property
    def state(self) -> State:
        """Whether it was measured, has failed, or was not tried."""
        return "missing" if self.outcome is None else self.outcome.state

    def to_json(self) -> dict[str, Any]:
        """Return what is known of it, as JSON values; of its results, the figures."""
        told: dict[str, Any] = {"label": self.label, "key": self.key, "folder": self.folder}
        told |= {"state": self.state, "new": self.new}
        if self.outcome is not None:
            told |= {"seconds": self.outcome.seconds}
            told |= {"peak_memory_bytes": self.outcome.peak_memory_bytes}
        if self.state == "failed" and self.outcome is not None:
            told |= {"sentence": self.outcome.sentence, "exit_code": self.outcome.exit_code}
        document = None if self.outcome is None else self.outcome.document
        if document is not None:
            told["figures"] = {each.name: each.of(document) for each in FIGURES}
        return told

    def cells(self) -> tuple[str, ...]:
        """Return its row in a table: name, state, figures or the sentence."""
        document = None if self.outcome is None else self.outcome.document
        if document is None:
            sentence = "" if self.outcome is None else self.outcome.sentence
            return self.label, self.state, *("" for _ in FIGURES), sentence
        values = [(each, each.of(document)) for each in FIGURES]
        shown = ("" if value is None else format(value, each.format) for each, value in values)
        return self.label, self.state, *shown, ""


@dataclass(frozen=True)
class Swept:
    """All cells of a sweep, in the order of its file.

    Attributes:
        name: Of the sweep.
        cells: Its cells.
    """

    name: str
    cells: tuple[SweptCell, ...]

    @property
    def failures(self) -> tuple[SweptCell, ...]:
        """The cells that have failed, now or before."""
        return tuple(cell for cell in self.cells if cell.state == "failed")

    def count(self, state: State) -> int:
        """Return how many cells stand so."""
        return sum(cell.state == state for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        counts = {state: self.count(state) for state in ("done", "failed", "missing")}
        cells = [cell.to_json() for cell in self.cells]
        return {"name": self.name, **counts, "cells": cells}

    def table(self) -> PlainTable:
        """Return a row for each cell."""
        title = (
            f"{self.name}: {self.count('done')} done, {self.count('failed')} failed, "
            f"{self.count('missing')} missing"
        )
        head = ("cell", "state", *(each.label for each in FIGURES), "")
        return PlainTable(title, head, tuple(cell.cells() for cell in self.cells))

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()
