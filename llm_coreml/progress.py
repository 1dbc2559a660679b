"""How long work tells how far it is, without knowing who listens.

progress.stage("quantize")
progress.advance(0.25)
progress.note("the head is stored twice: 12.1 MB more")
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener; the command line draws bars, the Python API stays silent."""

    def stage(self, name: str) -> None:
        """Begin a stage, ending the one before."""

    def advance(self, share: float) -> None:
        """Say which share of the stage is done, 0 to 1."""

    def note(self, text: str) -> None:
        """Say something that the user should know."""


class Silent:
    """Listens and does nothing."""

    def stage(self, name: str) -> None:
        """Ignore."""

    def advance(self, share: float) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
