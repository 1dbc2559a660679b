"""Cells of sweeps that failed, as a results folder tells of them. Brings no torch.

for failure in failures_in(Path("results")): print(failure.label, failure.sentence)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_coreml.printable import MESSAGE, printable

# How the folders of cells are called, and the record in each.
FOLDERS = "cell-"
CELL = "cell.json"
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Failure:
    """A cell that was tried and has no results.

    Attributes:
        label: What it is called in its sweep.
        sentence: Why it failed.
        exit_code: What the command line would have ended with.
        created: When, ISO 8601 in UTC.
    """

    label: str
    sentence: str
    exit_code: int
    created: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def cell_files(place: Path) -> list[Path]:
    """Return the records of the cells in a results folder, by name; none of what is no folder."""
    try:
        found = [path / CELL for path in place.iterdir() if path.name.startswith(FOLDERS)]
    except OSError:
        return []
    return sorted(path for path in found if path.is_file())


def failures_in(place: Path) -> list[Failure]:
    """Return the cells in a results folder that failed; records that are damaged are passed over.

    A cell whose record is damaged is tried again by its sweep.
    """
    found = []
    for path in cell_files(place):
        failure = _failure(path)
        if failure is not None:
            found.append(failure)
    return found


def _failure(path: Path) -> Failure | None:
    try:
        if path.stat().st_size > _LARGEST:
            return None
        told = json.loads(path.read_bytes())
        outcome = told["outcome"]
        if outcome["state"] != "failed":
            return None
        label, sentence = (
            printable(str(each), MESSAGE) for each in (told["label"], outcome["sentence"])
        )
        return Failure(label, sentence, int(outcome["exit_code"]), str(told["created"])[:25])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
