"""Timing of prompts and tokens: which calls are made, and what is made of their times."""

from __future__ import annotations

import pytest
import torch

from fake_clock import clock
from fake_runner import FakeRunner
from llm_coreml.eval.response import measure_response

TABLE = torch.eye(9)


def test_prompts_are_read_from_an_empty_cache_and_percentiles_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock(monkeypatch, 0.1, 0.2, 0.3, 0.4, 0.5)
    runner = FakeRunner(TABLE, context=100, label="this")
    found = measure_response(runner, 1.5, [1, 2, 3])
    assert (found.runtime, found.load_seconds, found.trials, found.warmups) == ("this", 1.5, 5, 1)
    assert [each.prompt_tokens for each in found.first_token] == [8, 50]
    for each in found.first_token:
        assert (each.trials, each.p50) == (5, pytest.approx(0.3))
        # Four steps lie between five values: 0.9 of the way is 0.6 into the last.
        assert each.p90 == pytest.approx(0.46) and each.p99 == pytest.approx(0.496)
    assert runner.resets == 1 + 2 * 6
    # A prompt of 50 is 6 times 8 and two; each of the six times it was read.
    assert sum(len(chunk) for chunk, _ in runner.calls) == 6 * 8 + 6 * 50 + 8 + 1 + 18
    assert found.peak_memory_bytes > 0


def test_decoding_goes_on_from_the_models_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 0.25)
    runner = FakeRunner(TABLE, context=100)
    found = measure_response(runner, 0.0, [1, 2, 3]).decode
    assert (found.tokens, found.p50, found.p99) == (20, 0.25, 0.25)
    assert found.tokens_per_second == 4.0
    # After a token the table foretells the same; the prompt of eight ends with 2.
    assert [chunk for chunk, _ in runner.calls[-5:]] == [[2]] * 5


def test_a_small_context_is_not_left() -> None:
    runner = FakeRunner(TABLE, context=8, seq_lengths=(1, 4))
    found = measure_response(runner, 0.0, [1])
    assert [each.prompt_tokens for each in found.first_token] == [4]
    assert found.decode.tokens == 3
