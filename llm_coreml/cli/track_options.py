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

    @contextmanager
    def telling(self, screen: Screen) -> Iterator[Telling]:
        """Give what tells trackers, and raise what failed behind the block, or with what ends it.

        Raises:
            ConfigError: a tracker that is not known; nothing is measured then.
            TrackerError: one could not be told.
        """
        telling = Telling(screen, read_trackers(self.track, screen), self.run_name or "")
        try:
            yield telling
        except LlmCoreMLError as error:
            if telling.failure is None:
                raise
            raise type(error)(f"{error} {telling.failure}") from None
        if telling.failure is not None:
            raise telling.failure


@dataclass
class Telling:
    """Tells trackers of an evaluation that is written.

    Attributes:
        screen: Draws the waiting.
        trackers: Whom to tell.
        run_name: What they call the run; empty for the name of what was measured.
        failure: What to say of those that were not told.
    """

    screen: Screen
    trackers: list[Tracker]
    run_name: str
    failure: TrackerError | None = None

    def tell(self, document: dict[str, Any], measured: Path, results: Path | None = None) -> None:
        """Tell all of them, whichever fails.

        Args:
            document: The evaluation.
            measured: What was measured.
            results: Folder to which it was appended.
        """
        if not self.trackers:
            return
        from llm_coreml.eval.trackers.record import record_of

        folder = measured.parent if measured.is_file() else measured
        bundle = folder if document["subject"]["kind"] == "bundle" else None
        record = record_of(document, bundle, self.run_name)
        failures: dict[Tracker, str] = {}
        for tracker in self.trackers:
            told = tell(self.screen, tracker, [record])
            if isinstance(told, str):
                failures[tracker] = told
        self.failure = failed(failures, bundle or results)


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


def tracked(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of trackers to a command, which is given them as `tracking`."""

    @functools.wraps(command)
    def call(track: tuple[str, ...], run_name: str | None, **given: Any) -> Any:
        return command(tracking=TrackOptions(track, run_name), **given)

    option = click.option(
        "--track",
        metavar=NAMES,
        multiple=True,
        help="Tell wandb, mlflow, trackio or tensorboard:DIR of it, too; several.",
    )
    return option(RUN_NAME(call))
