"""A clock that goes as a test says."""

from __future__ import annotations

import itertools
import time

import pytest


def clock(monkeypatch: pytest.MonkeyPatch, *steps: float) -> None:
    """Let every timed call take the next of `steps`, over and over."""
    now = 0.0
    ticks = itertools.cycle(itertools.chain.from_iterable((0.0, step) for step in steps))

    def perf_counter() -> float:
        nonlocal now
        now += next(ticks)
        return now

    monkeypatch.setattr(time, "perf_counter", perf_counter)
