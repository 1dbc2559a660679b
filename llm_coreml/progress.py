"""How long work tells how far it is, without knowing who listens, and what memory it takes.

progress.stage("quantize")
progress.advance(0.25)
progress.note("the head is stored twice: 12.1 MB more")
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from typing import Protocol

_M_ARENA_MAX = -8  # of glibc's malloc.h


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had resident, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free_memory() -> None:
    """Free what only refers to itself, and give the system back what is not in use."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Give the system back what the C library keeps of freed tensors."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc alone has it


def keep_one_heap() -> None:
    """Have all threads of this process allocate from one heap; for programs, not for libraries.

    The C library gives threads heaps of their own, and each keeps gaps where large tensors were.
    It must be called before there are threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)  # glibc alone has it


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
