"""What logs a record, and which trackers there are.

    tracker = Tracker.parse("tensorboard:runs")
    tracker.sink().log(record)

A sink is anything with `log`: one of one's own is given to `track` like the names of these.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from llm_coreml.errors import ConfigError, TrackerError, nearest
from llm_coreml.eval.trackers.mlflow_sink import MlflowSink
from llm_coreml.eval.trackers.record import Record
from llm_coreml.eval.trackers.tensorboard_sink import TensorBoardSink
from llm_coreml.eval.trackers.wandb_sinks import TrackioSink, WandbSink


class Sink(Protocol):
    """Where evaluations are logged."""

    def log(self, record: Record) -> str:
        """Log one as a run of its own, and return where it can be looked at.

        Raises:
            Exception: whatever the tracker's library raises.
        """


@dataclass(frozen=True)
class Kind:
    """A tracker that is known.

    Attributes:
        sink: Makes its sink for a place.
        library: The module that it needs.
        place: What may stand behind its name.
        needed: Whether that must.
    """

    sink: Callable[[str], Sink]
    library: str
    place: str
    needed: bool = False


KINDS: Mapping[str, Kind] = {
    "mlflow": Kind(MlflowSink, "mlflow", "EXPERIMENT"),
    "tensorboard": Kind(TensorBoardSink, "tensorboard", "DIR", needed=True),
    "trackio": Kind(TrackioSink, "trackio", "PROJECT"),
    "wandb": Kind(WandbSink, "wandb", "[ENTITY/]PROJECT"),
}


@dataclass(frozen=True)
class Tracker:
    """A tracker as the command line names it.

    Attributes:
        name: One of `KINDS`.
        place: A project, an experiment or a folder; empty for the tracker's own choice.
    """

    name: str
    place: str = ""

    @classmethod
    def parse(cls, text: str) -> Tracker:
        """Return what `NAME` or `NAME:PLACE` means.

        Raises:
            ConfigError: no such tracker, or no place where it needs one.
        """
        name, _, place = text.partition(":")
        if name not in KINDS:
            raise ConfigError(
                f"'{name}' is no tracker; they are {', '.join(KINDS)}.{nearest(name, KINDS)}"
            )
        if "\0" in place:
            raise ConfigError(f"'{text}' holds a NUL character, which no name does.")
        if KINDS[name].needed and not place:
            raise ConfigError(f"{name} needs to know where; give it as {name}:{KINDS[name].place}.")
        return cls(name, place)

    def __str__(self) -> str:
        return f"{self.name}:{self.place}" if self.place else self.name

    def sink(self) -> Sink:
        """Return its sink, for this process."""
        return KINDS[self.name].sink(self.place)

    def check_installed(self) -> None:
        """Refuse a tracker whose library is not there; nothing is loaded.

        Raises:
            TrackerError: as said.
        """
        # What a folder of that name would pass for has no origin.
        found = importlib.util.find_spec(KINDS[self.name].library)
        if found is None or found.origin is None:
            raise TrackerError(
                f"{self.name} is not installed; get it with pip install 'llm-coreml[{self.name}]'."
            )


def reason_of(error: BaseException) -> str:
    """Return what an error of a library says, as the rest of a sentence."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"'{error.filename}': {error.strerror}"
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = "" if isinstance(error, TrackerError) else type(error).__name__
    return ": ".join(filter(None, (kind, told.rstrip("."))))
