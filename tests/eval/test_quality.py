"""Perplexity and divergence against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fake_runner import FakeRunner
from llm_coreml.eval.quality import measure_quality

# P(next | 0), P(next | 1) of two models over two tokens.
ORIGINAL = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
OTHER = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
WINDOWS = [[0, 1, 0], [1, 1]]


def runner(probabilities: torch.Tensor, label: str = "fake") -> FakeRunner:
    # A constant on all logits of a row changes nothing.
    return FakeRunner(probabilities.log() + 3.0, label=label)


def test_values_by_hand() -> None:
    runners = {"original": runner(ORIGINAL, "a"), "artifact": runner(OTHER, "b")}
    original, artifact = measure_quality(runners, WINDOWS)
    assert (original.name, original.runtime) == ("original", "a")
    assert (artifact.name, artifact.runtime) == ("artifact", "b")
    # Scored are 1 after 0, 0 after 1, 1 after 1.
    cost = -(math.log(0.5) + math.log(0.25) + math.log(0.75)) / 3
    assert original.perplexity == pytest.approx(math.exp(cost), rel=1e-6)
    cost = -(math.log(0.75) + math.log(0.5) + math.log(0.5)) / 3
    assert artifact.perplexity == pytest.approx(math.exp(cost), rel=1e-6)
    # KL(original || artifact), the original's probabilities as weights.
    after_0 = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    after_1 = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert artifact.mean_kl == pytest.approx((after_0 + 2 * after_1) / 3, rel=1e-5)
    # The sorted costs are after_1, after_1, after_0; 0.99 lies 98 % of the way up the last step.
    assert artifact.p99_kl == pytest.approx(after_1 + 0.98 * (after_0 - after_1), rel=1e-5)


def test_agreement_counts_rows() -> None:
    likely = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    half = torch.tensor([[0.6, 0.4], [0.7, 0.3]])
    runners = {"original": runner(likely), "same": runner(likely), "half": runner(half)}
    original, same, other = measure_quality(runners, WINDOWS)
    assert original.top1_agreement is original.mean_kl is original.p99_kl is None
    assert same.top1_agreement == 1.0 and same.mean_kl == same.p99_kl == 0.0
    assert other.top1_agreement == pytest.approx(1 / 3)


def test_without_an_original_nothing_is_compared() -> None:
    (artifact,) = measure_quality({"artifact": runner(OTHER)}, WINDOWS)
    assert artifact.mean_kl is artifact.p99_kl is artifact.top1_agreement is None


def test_small_divergences_are_not_noise() -> None:
    """A shift of one part in a million has a KL of some 1e-13, and no less than zero."""
    table = torch.randn(4, 1000, dtype=torch.float64)
    shifted = table + 1e-6 * torch.randn(4, 1000, dtype=torch.float64)
    windows = [[0, 1, 2, 3, 0]]

    # float32 logits: the difference is rounded, and the measure must still be tiny.
    def fake(values: torch.Tensor) -> FakeRunner:
        return FakeRunner(values.to(torch.float32))

    _, other = measure_quality({"original": fake(table), "other": fake(shifted)}, windows)
    assert other.mean_kl is not None and 0.0 <= other.mean_kl < 1e-11


def test_windows_are_read_from_an_empty_cache_and_weigh_by_their_tokens() -> None:
    fake = runner(ORIGINAL)
    shares: list[float] = []
    measure_quality({"artifact": fake}, WINDOWS, shares.append)
    # The last token of a window is foretold and not read.
    assert fake.calls == [([0], 0), ([1], 1), ([1], 0)] and fake.resets == 2
    assert shares == [0.5, 1.0]
