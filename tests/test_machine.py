"""What keeps the memory of a process small."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llm_coreml.machine import machine_memory, peak_memory, settled

# Prints the C library's own account of its heaps, after a thread has allocated.
_HEAPS = """
import ctypes, sys, threading
from llm_coreml.machine import keep_one_heap
if "one" in sys.argv:
    keep_one_heap()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
thread = threading.Thread(target=lambda: c.malloc(10_000))
thread.start(); thread.join()
c.stdout_ = ctypes.c_void_p.in_dll(c, "stdout")
c.malloc_info(0, c.stdout_)
c.fflush(None)
"""


def test_a_process_takes_some_of_the_machine() -> None:
    assert 1 << 20 < peak_memory() < machine_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems remember it")
def test_a_peak_is_forgotten() -> None:
    code = """
from llm_coreml.machine import forget_peak, peak_memory
held = bytearray(b"x") * (64 << 20)
before = peak_memory()
del held
forget_peak()
print(before - peak_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 48 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have one heap")
@pytest.mark.parametrize(("argument", "one"), [("one", True), ("usual", False)])
def test_threads_share_the_heap(argument: str, one: bool) -> None:
    command = [sys.executable, "-c", _HEAPS, argument]
    decided = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    plain = {name: value for name, value in os.environ.items() if name not in decided}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
    told = done.stdout
    assert (told.count("<heap nr=") == 1) == one


@pytest.fixture
def thawed() -> Iterator[None]:
    """Nothing frozen at first, as in a process that has not asked; searched when a test says so."""
    gc.unfreeze()
    gc.disable()
    yield
    gc.enable()
    gc.freeze()


class Loop:
    """What only the search for garbage frees."""

    def __init__(self) -> None:
        self.itself = self


def loops() -> int:
    return sum(type(held) is Loop for held in gc.get_objects())


def test_a_settled_process_is_searched_for_new_garbage_alone(thawed: None) -> None:
    Loop()
    with settled():
        assert not loops() and gc.get_freeze_count()
        gc.collect()
        Loop()
        assert loops() == 1
        with settled():
            gc.collect()
            assert gc.get_freeze_count()
        assert gc.get_freeze_count(), "the block around it goes on"
    assert not gc.get_freeze_count() and loops() == 2
    gc.collect()
    assert not loops()


def test_what_a_process_has_frozen_itself_stays_so(thawed: None) -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with settled():
        Loop()
        gc.collect()
        assert not loops()
    assert gc.get_freeze_count() == frozen
