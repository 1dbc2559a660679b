"""Stages of long work on stderr: bars on a terminal, elsewhere a line each, and signs of life.

    stages = Stages(sys.stderr)
    stages.stage("quantize")
    stages.advance(0.25)
    stages.close()

A log shows `reading and quantizing weights ... 12.3 s`. A stage that takes longer than half a
minute says every half a minute how far it is, whether or not it was told anything meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llm_coreml.cli.process import INTERRUPTION
from llm_coreml.printable import MESSAGE, printable
from llm_coreml.progress_bar import span, time_left

_LABELS = {
    "open": "opening the checkpoint",
    "allocate": "measuring what each format costs",
    "quantize": "reading and quantizing weights",
    "calibrate": "reading and calibrating weights",
    "tune": "tuning scales and tables",
    "read": "reading a text with the quantized model",
    "lower": "lowering to an ExecuTorch program",
    "verify": "verifying the artifact",
    "delta": "finding what differs",
    "tasks": "listing tasks",
    "answer": "having bundles answer",
    "score": "scoring text",
    "layers": "measuring layer by layer",
    "time": "timing calls",
    "track": "telling a tracker",
    "push": "uploading to the hub",
    "watch": "watching every operation",
    "compare": "comparing every operation",
    "build": "building the C++ runner",
    "sweep": "running cells",
    "run": "running the program on ExecuTorch",
}
# Seconds between two signs of life in a log.
_PAUSE = 30.0


class Stages:
    """Draws stages as bars with the time left on a terminal, else as lines.

    Args:
        file: Where to.
        clock: Tells seconds.
        pause: Seconds between two lines about one stage, of `clock` and of the real one.
    """

    def __init__(
        self, file: TextIO, clock: Callable[[], float] = time.monotonic, pause: float = _PAUSE
    ) -> None:
        console = Console(file=file, highlight=False, soft_wrap=True, markup=False)
        self._lines: Bars | Lines = (
            Bars(console) if console.is_terminal else Lines(console, clock, pause)
        )

    def stage(self, name: str) -> None:
        """Begin a stage."""
        INTERRUPTION.check()
        self._lines.end()
        self._lines.begin(_LABELS.get(name, name))

    def advance(self, share: float) -> None:
        """Say which share of the stage is done."""
        INTERRUPTION.check()
        self._lines.advance(share)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._lines.note(printable(text, MESSAGE))

    def close(self, finished: bool = True) -> None:
        """End the last stage, or leave it as it is if it was not finished."""
        if finished:
            self._lines.end()
        self._lines.close()


class Bars:
    """A bar for each stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task: TaskID | None = None
        self._bars = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            # rich would lift what others print out of the descriptors that hide it.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bars.start()

    def begin(self, label: str) -> None:
        """Draw a bar that has no end yet."""
        self._task = self._bars.add_task(label, total=None)

    def advance(self, share: float) -> None:
        """Move the bar; the first call gives it an end."""
        if self._task is not None:
            self._bars.update(self._task, total=1.0, completed=share)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text)

    def end(self) -> None:
        """Fill the bar."""
        self.advance(1.0)
        self._task = None

    def close(self) -> None:
        """Leave the bars as they are."""
        self._bars.stop()


class Lines:
    """A line for each stage; in a long one more, from a thread, since some work tells little."""

    def __init__(self, console: Console, clock: Callable[[], float], pause: float) -> None:
        self._console, self._clock, self._pause = console, clock, pause
        self._label, self._share, self._start, self._told = "", 0.0, 0.0, 0.0
        self._open = False  # whether the stage's line goes on
        self._lock = threading.RLock()
        self._closed = threading.Event()
        threading.Thread(target=self._live, name="stages", daemon=True).start()

    def begin(self, label: str) -> None:
        """Begin a line."""
        with self._lock:
            self._label, self._share = label, 0.0
            self._start = self._told = self._clock()
            self._console.print(f"{label} ...", end="")
            self._open = True

    def advance(self, share: float) -> None:
        """Remember the share, and tell of it if it is time."""
        with self._lock:
            self._share = share
            self._tell()

    def note(self, text: str) -> None:
        """Print a line of its own."""
        with self._lock:
            self._end_line()
            self._console.print(text)

    def end(self) -> None:
        """Say how long the stage took."""
        with self._lock:
            if self._label:
                begun = "" if self._open else f"{self._label} ..."
                self._console.print(f"{begun} {self._clock() - self._start:.1f} s")
            self._label, self._open = "", False

    def close(self) -> None:
        """Print nothing more."""
        with self._lock:
            self._closed.set()
            self._label = ""
            self._end_line()

    def _live(self) -> None:
        while not self._closed.wait(self._pause):
            with self._lock:
                self._tell()

    def _tell(self) -> None:
        """Print how far the stage is, if nothing was said of it for long."""
        now = self._clock()
        if not self._label or now - self._told < self._pause:
            return
        self._told, passed, share = now, now - self._start, min(self._share, 1.0)
        self._end_line()
        left = time_left(passed, share)
        self._console.print(f"  {share:.0%} after {span(passed)}{left and f', {left}'}")

    def _end_line(self) -> None:
        if self._open:
            self._console.print()
        self._open = False
