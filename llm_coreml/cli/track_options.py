"""Trackers on the command line: which are asked for, and what becomes of those that fail."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_coreml.cli.process import INTERRUPTION
from llm_coreml.errors import LlmCoreMLError, TrackerError

if TYPE_CHECKING:  # rich and jsonschema, which --help does without
    from llm_coreml.cli.terminal import Screen
    from llm_coreml.eval.trackers.record import Record
    from llm_coreml.eval.trackers.sink import Tracker

NAMES = "NAME[:PLACE]"
RUN_NAME = click.option("--run-name", metavar="NAME", help="What trackers call the run.")


@dataclass(frozen=True)
class TrackOptions:
    """What was given.

    Attributes:
        track: Trackers by name and place.
        run_name: What they call the run.
    """

    track: tuple[str, ...]
    run_name: str | None

    def __post_init__(self) -> None:
        """Refuse an option that means nothing without another."""
        if self.run_name is not None and not self.track:
            raise click.UsageError("--run-name is what trackers call a run; give one with --track.")

    def trackers(self, screen: Screen) -> list[Tracker]:
        """Return the trackers; of those that are not installed, a note tells before the work.

        Raises:
            ConfigError: one that is not known.
        """
        return read_trackers(self.track, screen)

    def tell(
        self,
        screen: Screen,
        trackers: list[Tracker],
        document: dict[str, Any],
        measured: Path,
        results: Path | None,
    ) -> TrackerError | None:
        """Tell trackers of an evaluation that is written, and return what to say of failures.

        Args:
            screen: Draws the waiting.
            trackers: Whom to tell.
            document: The evaluation.
            measured: What was measured.
            results: Folder to which it was appended.
        """
        if not trackers:
            return None
        from llm_coreml.eval.trackers.record import record_of

        folder = measured.parent if measured.is_file() else measured
        bundle = folder if document["subject"]["kind"] == "bundle" else None
        record = record_of(document, bundle, self.run_name or "")
        failures: dict[Tracker, str] = {}
        for tracker in trackers:
            told = tell(screen, tracker, [record])
            if isinstance(told, str):
                failures[tracker] = told
        return failed(failures, bundle or results)


def read_trackers(given: tuple[str, ...], screen: Screen) -> list[Tracker]:
    """Return trackers by their names, each once."""
    if not given:
        return []
    from llm_coreml.eval.trackers.sink import Tracker

    trackers = list(map(Tracker.parse, dict.fromkeys(given)))
    for tracker in trackers:
        try:
            tracker.check_installed()
        except TrackerError as error:
            screen.progress.note(str(error))
    return trackers


def tell(screen: Screen, tracker: Tracker, records: list[Record]) -> list[str] | str:
    """Tell one tracker of evaluations: where they can be looked at, or why they cannot.

    Ctrl-C ends the waiting for it, and nothing else.
    """
    from llm_coreml.eval.trackers.tracking import send

    screen.progress.stage("track")
    try:
        places = send(records, tracker)
    except TrackerError as error:
        return str(error)
    except KeyboardInterrupt:
        if not INTERRUPTION.pardon():
            raise
        return f"{tracker.name} was interrupted."
    screen.progress.note(f"{tracker.name}: {places[-1]}")
    return places


def failed(failures: dict[Tracker, str], *places: Path | None) -> TrackerError | None:
    """Return what to say of trackers that were not told, and how to tell them again.

    Args:
        failures: Why each was not.
        places: Where the results are kept; None if they were printed alone.
    """
    if not failures:
        return None
    kept = [str(place) for place in places if place is not None]
    again = [word for tracker in failures for word in ("--to", str(tracker))]
    told = (
        f"The results are kept; tell again: {shlex.join(['llm-coreml', 'track', *kept, *again])}"
        if kept
        else "The results are those printed; --results DIR keeps them for llm-coreml track."
    )
    return TrackerError(f"{' '.join(failures.values())} {told}")


@contextmanager
def telling(failure: TrackerError | None) -> Iterator[None]:
    """Raise a tracker's failure behind the block, or with what ends the block."""
    try:
        yield
    except LlmCoreMLError as error:
        if failure is None:
            raise
        raise type(error)(f"{error} {failure}") from None
    if failure is not None:
        raise failure


def tracked(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of trackers to a command, which is given them as `track_options`."""

    @functools.wraps(command)
    def call(track: tuple[str, ...], run_name: str | None, **given: Any) -> Any:
        return command(track_options=TrackOptions(track, run_name), **given)

    option = click.option(
        "--track",
        metavar=NAMES,
        multiple=True,
        help="Tell wandb, mlflow, trackio or tensorboard:DIR of it, too; several.",
    )
    return option(RUN_NAME(call))
