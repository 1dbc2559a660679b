"""The cells of a results folder: what came of each, under the hash of what its figures follow from.

    store = Store(Path("results"))
    outcome = store.load(task)            # None: it was not tried yet

`results/cell-0123456789abcdef/` holds `cell.json`, and `results.json` of a cell that was measured,
which reports find as they find those of bundles; with `--keep` the bundle, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llm_coreml.bundle.folder import MANIFEST, RESULTS
from llm_coreml.eval.failed_cells import CELL, FOLDERS
from llm_coreml.eval.results_file import fits
from llm_coreml.eval.surroundings import now
from llm_coreml.eval.sweep.task import Outcome, Task
from llm_coreml.output import output_error, write_json

# Sixteen digits of a hash part more cells than there will ever be.
_DIGITS = 16
_VERSION = 1


class Store:
    """The cells in a results folder.

    Args:
        folder: The results folder; it is made when the first cell is tried.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> None:
        """Make the folder, where cells have their drafts, too.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(self.folder, error) from None

    def place(self, task: Task) -> Path:
        """Return the folder of a cell."""
        return self.folder / f"{FOLDERS}{task.key[:_DIGITS]}"

    def bundle(self, task: Task) -> Path:
        """Return where the bundle of a cell is kept."""
        return self.place(task) / task.slug

    def load(self, task: Task) -> Outcome | None:
        """Return what came of a cell, None if it was not tried, or its files are damaged."""
        try:
            told = json.loads((self.place(task) / CELL).read_bytes())
            outcome = Outcome(**told["outcome"])
            if told["version"] != _VERSION or told["key"] != task.key:
                return None
            if outcome.state == "done":
                document = json.loads((self.place(task) / RESULTS).read_bytes())
                return replace(outcome, document=document) if fits(document) else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return outcome if outcome.state == "failed" else None

    def holds_bundle(self, task: Task) -> bool:
        """Say whether the bundle of a cell was kept."""
        return (self.bundle(task) / MANIFEST).is_file()

    def save(self, task: Task, outcome: Outcome) -> None:
        """Keep what came of a cell.

        Raises:
            OutputError: it cannot be written.
        """
        place = self.place(task)
        try:
            place.mkdir(parents=True, exist_ok=True)
            # Whoever finds the record finds the results.
            if outcome.document is None:
                (place / RESULTS).unlink(missing_ok=True)
            else:
                write_json(place / RESULTS, dict(outcome.document))
        except OSError as error:
            raise output_error(place, error) from None
        write_json(place / CELL, _record(task, outcome))


def _record(task: Task, outcome: Outcome) -> dict[str, Any]:
    told: Mapping[str, Any] = {**asdict(replace(outcome, document=None))}
    return {
        "version": _VERSION,
        "key": task.key,
        "label": task.label,
        "model": Path(task.model).name,
        "settings": task.settings,
        "measured": task.measured,
        "weights_sha256": task.weights,
        "tool": task.tool,
        "created": now(),
        "outcome": {key: value for key, value in told.items() if key != "document"},
    }
