"""One export after another beside a training: one runs, and the newest of the others waits.

exporter = Exporter(Path("exports"), task, best)
exporter.submit(Moment(20, model, tokenizer, saved=None))
for finished in exporter.collect(wait=False): ...
"""

from __future__ import annotations

import atexit
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_coreml.config import ExportConfig
from llm_coreml.drafts import draft_folder
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.output import output_error
from llm_coreml.training.best import Best, Offered
from llm_coreml.training.export_process import Bounds, ExportProcess, Order
from llm_coreml.training.handover import hand_over

_PREFIX = ".llm-coreml-step-"


@dataclass(frozen=True)
class Task:
    """What is done with the weights of each moment.

    Attributes:
        config: Settings of the export.
        text: UTF-8 file to measure on; None takes the held-out text that ships in the package.
        tokens: Most tokens to score.
        bounds: What the process may take.
    """

    config: ExportConfig
    text: str | None
    tokens: int
    bounds: Bounds


@dataclass(frozen=True)
class Moment:
    """A model in the midst of its training.

    Attributes:
        step: Step of the training.
        model: The live model.
        tokenizer: Its tokenizer, or None.
        saved: Folder of the trainer's checkpoint of this step, if there is one.
    """

    step: int
    model: torch.nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    saved: Path | None


@dataclass(frozen=True)
class Finished:
    """What became of an export.

    Attributes:
        step: Step of the weights.
        seconds: From the moment on, by the clock.
        offered: Its figures, and whether it was kept; None if it failed.
        failure: Why it failed, as a clause.
    """

    step: int
    seconds: float
    offered: Offered | None
    failure: str


@dataclass
class _Job:
    """Weights on disk, and the process that exports them once it is their turn."""

    step: int
    begun: float
    scratch: contextlib.ExitStack
    place: Path
    order: Order
    process: ExportProcess | None = None


class Exporter:
    """Runs the exports of one training."""

    def __init__(self, output: Path, task: Task, best: Best) -> None:
        """Export into `output`, and offer what is made to `best`."""
        self._output, self._task, self._best = output, task, best
        self._running: _Job | None = None
        self._waiting: _Job | None = None

    def submit(self, moment: Moment) -> int | None:
        """Take the weights of a moment, and export them now or when what runs has ended.

        Returns:
            The step of the export that waited before, which is left out now; None if none did.

        Raises:
            LlmCoreMLError: the weights cannot be read or written.
        """
        job = self._hand_over(moment)
        atexit.register(self.abandon)  # a training that is interrupted tells nobody
        left_out, self._waiting = self._waiting, job
        self._start_next()
        if left_out is None:
            return None
        left_out.scratch.close()
        return left_out.step

    def _hand_over(self, moment: Moment) -> _Job:
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            try:
                self._output.mkdir(parents=True, exist_ok=True)
                place = stack.enter_context(draft_folder(self._output, _PREFIX))
            except OSError as error:
                raise output_error(self._output, error) from None
            folder = hand_over(moment.model, moment.tokenizer, place, moment.step, moment.saved)
            task, bundle = self._task, place / f"step-{moment.step}"
            order = Order(folder, bundle, task.config, task.text, task.tokens)
            return _Job(moment.step, begun, stack.pop_all(), place, order)

    def _start_next(self) -> None:
        if self._running is None and self._waiting is not None:
            self._running, self._waiting = self._waiting, None
            with contextlib.suppress(OSError):  # told when it is collected
                job = self._running
                job.process = ExportProcess(job.order, job.place, self._task.bounds)

    def collect(self, wait: bool) -> Iterator[Finished]:
        """Yield what has ended, and start what waits.

        Args:
            wait: Wait for all of it.
        """
        while self._running is not None:
            job = self._running
            if job.process is not None:
                if wait:
                    job.process.wait()
                elif not job.process.ended:
                    return
            self._running = None
            # Whatever becomes of this one, in here or where it is told of.
            try:
                finished = self._finished(job)
            finally:
                self._start_next()
            yield finished
        atexit.unregister(self.abandon)

    def _finished(self, job: _Job) -> Finished:
        offered, failure = None, "no process could be started for it"
        with job.scratch:
            if job.process is not None:
                failure = job.process.failure() or ""
            if not failure:
                try:
                    offered = self._best.offer(job.order.output)
                except LlmCoreMLError as error:
                    failure = str(error)
        return Finished(job.step, time.monotonic() - job.begun, offered, failure)

    def abandon(self) -> None:
        """End what runs, and forget what waits."""
        for job in (self._running, self._waiting):
            if job is not None:
                with job.scratch:
                    if job.process is not None:
                        job.process.kill()
        self._running = self._waiting = None
        atexit.unregister(self.abandon)
