"""Timing: which calls are made, and what is made of their times. No time is asserted."""

from __future__ import annotations

import pytest
import torch

from fake_clock import clock
from fake_runner import FakeRunner
from llm_coreml.eval.latency import measure_latency
from llm_coreml.eval.timings import Latency

TABLE = torch.zeros(9, 9)


def test_every_length_is_timed_and_the_median_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 0.3, 0.1, 0.9, 0.2, 0.4)
    runner = FakeRunner(TABLE, label="this")
    found = measure_latency(runner, [1, 2, 3])
    assert [(row.tokens, row.runs, row.runtime) for row in found] == [
        (1, 5, "this"),
        (4, 5, "this"),
        (8, 5, "this"),
    ]
    assert [row.seconds for row in found] == pytest.approx([0.3] * 3)
    # One call of each length is not timed.
    assert [len(chunk) for chunk, _ in runner.calls] == [1] * 6 + [4] * 6 + [8] * 6
    assert runner.calls[-1][0] == [1, 2, 3, 1, 2, 3, 1, 2]


def test_slow_calls_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 6.0)
    runner = FakeRunner(TABLE, seq_lengths=(1,))
    assert measure_latency(runner, [1, 2])[0].runs == 2


def test_a_full_cache_is_emptied() -> None:
    runner = FakeRunner(TABLE, context=8, seq_lengths=(1, 8))
    measure_latency(runner, [1])
    assert all(start + len(chunk) <= 8 for chunk, start in runner.calls)
    assert all(start == 0 for chunk, start in runner.calls if len(chunk) == 8)


def test_throughput() -> None:
    assert Latency("this", 64, 0.5, 5).tokens_per_second == 128.0
