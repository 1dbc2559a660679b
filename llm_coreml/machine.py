"""What this machine has: memory, what this process took of it and how to give some back; cores.

machine_memory()       # bytes
free_memory()
peak_memory()          # bytes
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import resource
import sys

_M_ARENA_MAX = -8  # of glibc's malloc.h


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
