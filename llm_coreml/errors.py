"""Every error a user can meet, with the exit code that the command line returns for it.

    LlmCoreMLError            1   anything below; also a bug we could name
      ConfigError             2   flags or fields that contradict a rule (as click's usage errors)
      GateError               3   measured, and worse than a gate allows
      CheckpointError         4   the model's files are absent, damaged or not what config.json says
      UnsupportedError        5   a model, weight format or target that is understood and refused
      OutputError             6   the output exists, cannot be written, or the disk is full
      ArtifactError           7   a .pte or bundle that is corrupt, hostile or not ours to run
      VerificationError       8   the artifact does not compute what the model computes
      SystemUnfitError        9   the operating system lacks what this package needs of it
      UnmeasuredError        10   a gate asks for a figure that was not measured
      SweepError             11   cells of a sweep failed; the others are measured and kept
      TrackerError           12   measured and kept, but a tracker could not be told

A message is one sentence or two: the value, the rule it breaks, and what to do next.
Ctrl-C exits with 130, SIGHUP with 129, SIGTERM with 143.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from llm_coreml.printable import MESSAGE, printable


class LlmCoreMLError(Exception):
    """Base of all errors that this package raises on purpose.

    A message may quote names from a hostile file, so it is kept to one line of bounded length that
    no terminal takes for a command.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MESSAGE))


class ConfigError(LlmCoreMLError):
    """A setting breaks a rule, or two settings contradict each other."""

    exit_code = 2


class GateError(LlmCoreMLError):
    """What was measured is worse than a gate allows."""

    exit_code = 3


class CheckpointError(LlmCoreMLError):
    """The checkpoint is absent, damaged, or disagrees with its own config.json."""

    exit_code = 4


class UnsupportedError(LlmCoreMLError):
    """The request is understood, but the family, format or target cannot hold it."""

    exit_code = 5


class UnknownFamilyError(UnsupportedError):
    """The model's architecture has no family."""


class OutputError(LlmCoreMLError):
    """The output folder exists already, cannot be written, or the disk is full."""

    exit_code = 6


class ArtifactError(LlmCoreMLError):
    """A `.pte` or bundle is corrupt, lies about itself, or holds what we cannot run."""

    exit_code = 7


class VerificationError(LlmCoreMLError):
    """The artifact's output is further from the model's than the bound allows.

    Attributes:
        found: The record of what was found, a dataclass; None if no logits were compared.
    """

    exit_code = 8

    def __init__(self, message: str, found: object = None) -> None:
        super().__init__(message)
        self.found = found


class SystemUnfitError(LlmCoreMLError):
    """The operating system lacks what this package needs of it."""

    exit_code = 9


class UnmeasuredError(LlmCoreMLError):
    """A gate asks for a figure that was not measured, so that nobody knows whether it holds."""

    exit_code = 10


class SweepError(LlmCoreMLError):
    """Cells of a sweep have failed; the others are measured and kept."""

    exit_code = 11


class TrackerError(LlmCoreMLError):
    """A tracker could not be told of an evaluation, which is kept."""

    exit_code = 12


def nearest(value: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known name closest to `value`, or an empty string."""
    matches = difflib.get_close_matches(value, list(known), n=1, cutoff=0.4)
    return f" Did you mean '{matches[0]}'?" if matches else ""
