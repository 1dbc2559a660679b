"""What this machine has: memory, what this process took of it and how to give some back; cores.

machine_memory()       # bytes
free_memory()
peak_memory()          # bytes
with settled():        # what is there already is not looked through for garbage
    ...
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import resource
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_M_ARENA_MAX = -8  # of glibc's malloc.h
# A program that loads half a million objects that stay looks for garbage after so many new ones.
_NEW_OBJECTS = 10_000


@dataclass
class _Settled:
    """How many blocks of `settled` are open, in all threads."""

    blocks: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_SETTLED = _Settled()


@functools.cache
def machine_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has none
        return os.cpu_count() or 1


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had resident, mapped files included."""
    # Linux counts what the process was copied from into the other figure.
    with contextlib.suppress(OSError, ValueError, IndexError):
        told = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(told.split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def forget_peak() -> None:
    """Have `peak_memory` tell of what comes from here on, where the system can: on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def free_memory() -> None:
    """Free what only refers to itself, and give the system back what is not in use."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Give the system back what the C library keeps of freed tensors."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc alone has it


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Have the search for garbage pass over what is there when the block begins, until it ends.

    Python goes through all objects of a process for it: of the libraries that an export loads they
    are so many that it takes most of a second each time. A block within a block adds what has come
    since. Where the process has frozen objects itself, they stay frozen, and nothing is added.
    """
    with _SETTLED.lock:
        ours = _SETTLED.blocks > 0 or gc.get_freeze_count() == 0
        if ours:
            _SETTLED.blocks += 1
            gc.freeze()
    try:
        yield
    finally:
        if ours:
            with _SETTLED.lock:
                _SETTLED.blocks -= 1
                if not _SETTLED.blocks:
                    gc.unfreeze()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage but when asked: graphs live long, and going through them takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with settled():
            yield
    finally:
        if enabled:
            gc.enable()


def collect_rarely() -> None:
    """Look for garbage after so many new objects only; for programs, not for libraries."""
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])


def keep_one_heap() -> None:
    """Have all threads of this process allocate from one heap; for programs, not for libraries.

    The C library gives threads heaps of their own, and each keeps gaps where large tensors were.
    It must be called before there are threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)  # glibc alone has it
