"""One bar for all of a long work: in a terminal, in a notebook, and as lines in a log.

    listener = listener_of(True)             # or False, a function of a `Step`, a `Progress`
    listener.stage("quantize")
    listener.close()

Where nobody can read standard error, nothing is written. A log gets a line for each stage and one
every half a minute, never a bar that writes over itself.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llm_coreml.printable import MESSAGE, printable
from llm_coreml.progress import Progress, Silent

# Which share of the work is done when a stage begins, as tiny and large models take it.
EXPORT = {
    "open": 0.0, "allocate": 0.02, "quantize": 0.05, "calibrate": 0.05, "tune": 0.3, "read": 0.4,
    "lower": 0.5, "verify": 0.7,
}  # fmt: skip
EVALUATION = {"open": 0.0, "score": 0.05, "layers": 0.85, "time": 0.9}
# Seconds between two lines about one stage in a log.
_PAUSE = 30.0
# Below this share of a stage, nobody knows what is left of it.
_TOO_EARLY = 0.02


@dataclass(frozen=True)
class Step:
    """What a function that listens is told.

    Attributes:
        stage: The stage that runs.
        share: How much of it is done, 0 to 1.
        note: What the user should know, None where it is only going on.
    """

    stage: str
    share: float
    note: str | None = None


def share_done(step: Step, places: Mapping[str, float]) -> float:
    """Return which share of a work is done.

    Args:
        step: What runs.
        places: Which share is done when a stage begins: `EXPORT` or `EVALUATION`.
    """
    begins = places.get(step.stage, 0.0)
    return begins + step.share * (_end_of(begins, places) - begins)


def _end_of(begins: float, places: Mapping[str, float]) -> float:
    """Return which share is done when the stage ends that began at one."""
    return min((at for at in places.values() if at > begins), default=1.0)


def time_left(passed: float, share: float) -> str:
    """Return `12 min left` of a stage of which a share is done, empty while nobody knows.

    Args:
        passed: Seconds since it began.
        share: How much is done, 0 to 1.
    """
    if not _TOO_EARLY <= share < 1:
        return ""
    return f"{span(passed * (1 - share) / share)} left"


def span(seconds: float) -> str:
    """Return `40 s`, `12 min` or `1 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class _Listener(Progress, Protocol):
    """A listener that is told of the end."""

    def close(self) -> None: ...


@contextlib.contextmanager
def listening(
    asked: Progress | bool | Callable[[Step], object] | None,
    begins: Mapping[str, float] = EXPORT,
) -> Iterator[Progress]:
    """Give the listener that is asked for, and tell it of the end.

    Args:
        asked: True draws a bar, False and None are silent, a function is called with each `Step`.
        begins: Which share of a bar is done when each stage begins.
    """
    if asked is None or asked is False:
        yield Silent()
    elif asked is True:
        bar = _bar(begins)
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield _Calls(asked) if callable(asked) else asked


class _Calls:
    """Calls a function."""

    def __init__(self, call: Callable[[Step], object]) -> None:
        self._call = call
        self._step = Step("", 0.0)

    def stage(self, name: str) -> None:
        self._tell(Step(name, 0.0))

    def advance(self, share: float) -> None:
        self._tell(Step(self._step.stage, share))

    def note(self, text: str) -> None:
        self._call(Step(self._step.stage, self._step.share, printable(text, MESSAGE)))

    def _tell(self, step: Step) -> None:
        self._step = step
        self._call(step)


def _bar(begins: Mapping[str, float]) -> _Listener:
    with warnings.catch_warnings():  # a notebook without widgets is told of them otherwise
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
        from tqdm.std import tqdm as plain
    in_notebook = tqdm is not plain and "ipykernel" in sys.modules
    return _Bar(tqdm, begins) if in_notebook or _is_terminal() else _Lines()


def _is_terminal() -> bool:
    with contextlib.suppress(OSError, ValueError):  # a stream that is closed
        return sys.stderr is not None and sys.stderr.isatty()
    return False


class _Bar:
    """A bar that goes from the first stage to the end of the last."""

    def __init__(self, kind: Any, begins: Mapping[str, float]) -> None:
        self._bar = kind(total=1.0, desc="begin", leave=False, bar_format="{desc:<10} {bar} "
                         "{percentage:3.0f}% {elapsed}{postfix}")  # fmt: skip
        self._places = begins
        self._begins, self._ends = 0.0, 0.0
        self._start = time.monotonic()

    def stage(self, name: str) -> None:
        self._begins = max(self._bar.n, self._places.get(name, self._ends))
        self._ends = _end_of(self._begins, self._places)
        self._start = time.monotonic()
        self._bar.set_description(name, refresh=False)
        self._bar.set_postfix_str("", refresh=False)
        self._move(self._begins)

    def advance(self, share: float) -> None:
        left = time_left(time.monotonic() - self._start, share)
        self._bar.set_postfix_str(left, refresh=False)
        self._move(self._begins + share * (self._ends - self._begins))

    def note(self, text: str) -> None:
        self._bar.write(printable(text, MESSAGE), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def _move(self, done: float) -> None:
        self._bar.update(max(done, self._bar.n) - self._bar.n)


class _Lines:
    """A line for each stage, and signs of life."""

    def __init__(self) -> None:
        self._stage, self._told = "", time.monotonic()
        self._start = self._told

    def stage(self, name: str) -> None:
        self._stage, self._start = name, time.monotonic()
        self._tell(name)

    def advance(self, share: float) -> None:
        if time.monotonic() - self._told >= _PAUSE:
            left = time_left(time.monotonic() - self._start, share)
            self._tell(f"{self._stage}: {share:.0%}{left and f', {left}'}")

    def note(self, text: str) -> None:
        self._tell(printable(text, MESSAGE))

    def close(self) -> None:
        pass

    def _tell(self, text: str) -> None:
        self._told = time.monotonic()
        stream = sys.stderr  # None where a process has no place for it
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                print(f"llm-coreml: {text}", file=stream, flush=True)
