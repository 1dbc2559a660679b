"""Pieces of work in processes of their own, which share what this process has in memory.

    for number, result in in_parallel(work, range(40), jobs=4, threads=1): ...

Processes are forked: models that are loaded are there for all of them, and each has its own caches.
What a process cannot do is done here again, so that whoever asks hears why.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait

import torch

from llm_coreml.drafts import ENDING

Work = Callable[[int], bytes]

_PR_SET_PDEATHSIG = 1  # of Linux' prctl.h
# Bytes of a number on its way to a process.
_WIDTH = 8


def can_fork() -> bool:
    """Return whether this process can be forked, with libraries for matrices: on Linux alone.

    One that `multiprocessing` ends with its parent may have no processes of its own.
    """
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


@contextlib.contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Let torch use so many threads inside of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_parallel(
    work: Work, numbers: Iterable[int], jobs: int, threads: int
) -> Iterator[tuple[int, bytes]]:
    """Yield each number with what `work` makes of it, as it is done.

    Args:
        work: Returns at least one byte.
        numbers: What it is called with.
        jobs: Most processes; with one there is no further one.
        threads: Of torch, for each call.
    """
    waiting = deque(numbers)
    count = min(jobs, len(waiting))
    with computing_with(threads):
        if count > 1:
            with _workers(work, count, threads) as ends:
                yield from _shared_out(work, waiting, ends)
        while waiting:
            number = waiting.popleft()
            yield number, work(number)


def _shared_out(
    work: Work, waiting: deque[int], ends: list[Connection]
) -> Iterator[tuple[int, bytes]]:
    """Give each process the next number until there is none, or no process any more."""
    busy: dict[Connection, int] = {}

    def give(end: Connection) -> None:
        if waiting:
            with contextlib.suppress(OSError):  # it is gone
                end.send_bytes(waiting[0].to_bytes(_WIDTH, "little"))
                busy[end] = waiting.popleft()

    for end in ends:
        give(end)
    while busy:
        ready = wait(list(busy))
        for end in [each for each in busy if each in ready]:
            number, result = busy.pop(end), b""
            with contextlib.suppress(EOFError, OSError):
                result = end.recv_bytes()
                give(end)
            # It failed, or was killed.
            yield number, result or work(number)


@contextlib.contextmanager
def _workers(work: Work, count: int, threads: int) -> Iterator[list[Connection]]:
    """Give the ends of pipes to processes, which are gone when the block ends."""
    context = multiprocessing.get_context("fork")
    processes = []
    ends = []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, work, threads, os.getpid()), daemon=True
            )
            processes.append(process)
            with warnings.catch_warnings():  # of threads, which no process gets but the first
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            there.close()
            ends.append(here)
        yield ends
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for end in ends:
            end.close()


def _serve(end: Connection, work: Work, threads: int, parent: int) -> None:
    """Work off numbers until the process that sends them is gone."""
    for told in ENDING:
        # Ctrl-C reaches every process of a terminal; the first one tells of it.
        signal.signal(told, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The thread that was forked waits for ever for OpenMP's others, which were not.
    fresh = threading.Thread(target=_work_off, args=(end, work, threads, parent))
    fresh.start()
    fresh.join()


def _work_off(end: Connection, work: Work, threads: int, parent: int) -> None:
    torch.set_num_threads(threads)
    while os.getppid() == parent:
        try:
            number = int.from_bytes(end.recv_bytes(), "little")
        except (EOFError, OSError):
            return
        try:
            result = work(number)
        # Whatever it is, the first process meets it, too, and raises it.
        except Exception:
            result = b""
        end.send_bytes(result)
