"""TensorBoard: an event file with figures, settings as hparams, document and card as texts."""

from __future__ import annotations

import datetime
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

from llm_coreml.eval.trackers.record import Record


@dataclass(frozen=True)
class TensorBoardSink:
    """Writes event files.

    Attributes:
        place: Folder of the logs, in which each run gets a folder.
    """

    place: str

    def log(self, record: Record) -> str:
        """Write a run, and return its folder."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        made = datetime.datetime.strptime(record.created, "%Y-%m-%dT%H:%M:%SZ")
        when = made.replace(tzinfo=datetime.timezone.utc).timestamp()
        folder = _new_folder(Path(self.place), f"{_safe(record.name)}-{made:%Y%m%d-%H%M%S}")
        with SummaryWriter(str(folder)) as writer:
            # `add_hparams` would put them into a run of their own.
            settings = hparams(dict(record.config), dict(record.metrics))  # type: ignore[no-untyped-call]
            for summary in settings:
                writer.file_writer.add_summary(summary, 0, when)
            for name, value in record.metrics.items():
                writer.add_scalar(name, value, 0, when, double_precision=True)
            writer.add_text("models", _table(record), 0, when)
            if record.card:
                writer.add_text("card", record.card, 0, when)
            text = json.dumps(record.document, indent=2, sort_keys=True)
            writer.add_text("results", textwrap.indent(text, "    "), 0, when)
        return str(folder)


def _new_folder(place: Path, name: str) -> Path:
    """Make a folder that no other run has."""
    place.mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        folder = place / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir()
        except FileExistsError:
            count += 1
        else:
            return folder


def _safe(name: str) -> str:
    """Return a name as that of a folder."""
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    return kept[:96].lstrip(".") or "run"


def _table(record: Record) -> str:
    """Return the figures of each model in Markdown."""
    columns, rows = record.models
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(each) for each in line)} |" for line in lines)


def _cell(value: str | float | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value or ""
