"""A cell in its own process: the export, its evaluation, and what came of them as a line of JSON.

The process gets its task as a line on stdin, and ends when stdin does, which is when whoever tries
it is gone. On stdout go lines: `{"share": 0.4}` while it works, and its outcome at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from llm_coreml.bundle.typed_json import read_record
from llm_coreml.config import ExportConfig
from llm_coreml.drafts import ENDING, draft_folder
from llm_coreml.errors import ConfigError, LlmCoreMLError
from llm_coreml.eval.evaluate import evaluate
from llm_coreml.eval.surroundings import this_tool
from llm_coreml.eval.sweep.task import Task
from llm_coreml.machine import keep_one_heap, peak_memory
from llm_coreml.own_process import at_end_of_stdin, bound_further_memory
from llm_coreml.pipeline import export
from llm_coreml.printable import MESSAGE, printable
from llm_coreml.progress_bar import EVALUATION, EXPORT, share_done
from llm_coreml.quiet import quiet
from llm_coreml.reference.program.execution import Execution

# Seconds between two lines about how far it is.
_PAUSE = 1.0
# Which share of a cell's time the export takes, more or less.
_EXPORTED = 0.6
# Seconds in which an interrupted process cleans up.
_GRACE = 20.0


def run() -> None:
    """Do the task on stdin, in a process of its own."""
    keep_one_heap()
    for number in ENDING:
        signal.signal(number, _interrupt)
    # Libraries print where they like, and what came of it has a descriptor of its own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task = read_record(Task, json.loads(sys.stdin.readline()))
    at_end_of_stdin(_end)
    if task.memory is not None:
        bound_further_memory(task.memory)
    reports = _Reports(answers)
    reports.tell(_outcome(task, reports))
    os._exit(0)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end() -> None:
    """End this process, and those that it started."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.killpg(0, signal.SIGKILL)


class _Reports:
    """Lines on how far a cell is, few enough that nobody is kept busy by them.

    Attributes:
        peak: Most bytes of memory that the process was found to have had.
    """

    def __init__(self, answers: TextIO) -> None:
        self._answers, self._told = answers, 0.0
        self.peak = 0

    def share(self, share: float) -> None:
        """Tell which share of the cell is done, unless that was told just now."""
        # An evaluation has the system forget it, for the program alone to be measured.
        self.peak = max(self.peak, peak_memory())
        now = time.monotonic()
        if now - self._told >= _PAUSE:
            self._told = now
            self.tell({"share": round(share, 4)})

    def tell(self, value: dict[str, Any]) -> None:
        """Write a line."""
        self._answers.write(json.dumps(value, allow_nan=False) + "\n")
        self._answers.flush()


def _outcome(task: Task, reports: _Reports) -> dict[str, Any]:
    """Return what came of a task: its results, or why there are none."""
    try:
        with quiet(), _place(task) as place:
            document = _measure(task, place, reports)
        return {"document": document, "peak_memory_bytes": max(reports.peak, peak_memory())}
    except LlmCoreMLError as error:
        sentence, code = str(error), error.exit_code
    except MemoryError:
        sentence, code = _out_of_memory(task), 1
    except Exception as error:
        told = printable(str(error), MESSAGE)
        short = "alloc" in told and "memory" in told
        sentence = f"an unexpected {type(error).__name__}: {told}"
        sentence, code = _out_of_memory(task) if short else sentence, 1
    peak = max(reports.peak, peak_memory())
    return {"sentence": sentence, "exit_code": code, "peak_memory_bytes": peak}


def _out_of_memory(task: Task) -> str:
    if task.memory is None:
        return (
            "The machine's memory is not enough; say what a cell takes with memory under limits, "
            "or give a smaller model."
        )
    return (
        f"It needs more than the {task.memory:,} bytes of memory that a cell may take; set more "
        "with memory under limits, and fewer --jobs."
    )


@contextlib.contextmanager
def _place(task: Task) -> Iterator[Path]:
    """Give where the bundle is to be: in its kept place, or in a draft that is gone afterwards."""
    if task.keep is not None:
        yield Path(task.keep) / task.slug
        return
    parent = Path(task.folder)
    with draft_folder(parent if parent.is_dir() else Path(tempfile.gettempdir())) as draft:
        yield draft / task.slug


def _measure(task: Task, place: Path, reports: _Reports) -> dict[str, Any]:
    if this_tool().version != task.tool:
        raise ConfigError(
            f"This sweep is of llm-coreml {task.tool}, and the cell's machine has "
            f"{this_tool().version}; install the same on all."
        )
    export(
        task.model,
        output=place,
        config=ExportConfig.from_json(task.settings),
        overwrite=True,
        cache=task.cache,
        progress=lambda step: reports.share(_EXPORTED * share_done(step, EXPORT)),
    )
    measured = task.measured
    text = measured["text"]
    result = evaluate(
        place,
        model=task.model,
        text=None if text is None else Path(text),
        tokens=measured["tokens"],
        artifact_only=measured["artifact_only"],
        execution=Execution(measured["mode"], measured["device"]),
        cache=task.cache,
        progress=lambda step: reports.share(
            _EXPORTED + (1.0 - _EXPORTED) * share_done(step, EVALUATION)
        ),
    )
    if result.source is not None and result.source["sha256"] != task.weights:
        raise ConfigError("The model has changed while the sweep ran; start the sweep again.")
    return result.to_json()
