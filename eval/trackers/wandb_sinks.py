"""Weights & Biases, and Trackio, which has the same calls.

Figures are logged once, at the run's only step; the table has a row for each model; the document
and the card are an artifact. Where it goes to is the library's own matter: WANDB_MODE,
WANDB_ENTITY, WANDB_BASE_URL, TRACKIO_DIR, TRACKIO_SPACE_ID and such. Of this machine nothing is
told but what the record has.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_coreml.eval.trackers.record import Record

_PROJECT = "llm-coreml"
# Seconds until a server that does not answer counts as down.
_PATIENCE = 30.0


@dataclass(frozen=True)
class WandbSink:
    """Logs to Weights & Biases.

    Attributes:
        place: `PROJECT` or `ENTITY/PROJECT`; empty for WANDB_PROJECT, or else llm-coreml.
    """

    place: str = ""

    def log(self, record: Record) -> str:
        """Log a run, and return its address; of one that is offline, its folder."""
        import wandb

        entity, _, project = self.place.rpartition("/")
        settings = wandb.Settings(
            init_timeout=_PATIENCE,
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        run = wandb.init(
            entity=entity or None,
            project=project or os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=record.name,
            config=dict(record.config),
            job_type="evaluation",
            settings=settings,
        )
        _log(wandb, run, record)
        where = str(Path(run.dir).parent) if run.offline else str(run.url)
        run.finish()
        return where


@dataclass(frozen=True)
class TrackioSink:
    """Logs to Trackio.

    Attributes:
        place: The project; empty for TRACKIO_PROJECT, or else llm-coreml.
    """

    place: str = ""

    def log(self, record: Record) -> str:
        """Log a run, and return what shows it."""
        import trackio

        project = self.place or os.environ.get("TRACKIO_PROJECT") or _PROJECT
        run = trackio.init(
            project,
            name=record.name,
            config=dict(record.config),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        _log(trackio, run, record)
        run.finish()
        return f"trackio show --project {project}"


def _log(library: Any, run: Any, record: Record) -> None:
    columns, rows = record.models
    run.log({**record.metrics, "models": library.Table(columns=list(columns), data=rows)})
    kept = library.Artifact(f"{_safe(record.name)}-evaluation", type="evaluation")
    with tempfile.TemporaryDirectory(prefix="llm-coreml-") as folder:
        for path in record.write(Path(folder)):
            kept.add_file(str(path), name=path.name)
        run.log_artifact(kept)


def _safe(name: str) -> str:
    """Return a name as both allow it for artifacts."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)[:96]
