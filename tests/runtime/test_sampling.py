"""The choice of the next token."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.runtime.sampling import Sampler, Sampling

# Probabilities 0.5, 0.3, 0.15 and 0.05, the likeliest not first.
PROBABILITIES = (0.3, 0.5, 0.05, 0.15)
LOGITS = torch.tensor([math.log(p) for p in PROBABILITIES])


def draws(count: int, temperature: float, top_p: float = 1.0, seed: int = 0) -> list[int]:
    sampler = Sampler(Sampling(temperature, top_p, seed))
    return [sampler.choose(LOGITS) for _ in range(count)]


def test_zero_takes_the_most_likely() -> None:
    assert draws(5, 0.0) == [1] * 5 and draws(5, 0.0, top_p=0.1, seed=3) == [1] * 5


def test_frequencies_are_the_probabilities() -> None:
    count = 5_000
    found = Counter(draws(count, 1.0))
    for token, probability in enumerate(PROBABILITIES):
        deviation = math.sqrt(probability * (1 - probability) / count)
        assert abs(found[token] / count - probability) < 5 * deviation


def test_temperature_flattens_and_sharpens() -> None:
    count = 5_000
    for temperature in (0.5, 2.0):
        weights = [probability ** (1 / temperature) for probability in PROBABILITIES]
        found = Counter(draws(count, temperature))
        for token, weight in enumerate(weights):
            assert abs(found[token] / count - weight / sum(weights)) < 0.035


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-3])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    assert draws(5, temperature) == [1] * 5


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (0.01, {1}),
        (0.49, {1}),
        (0.51, {1, 0}),
        (0.79, {1, 0}),
        (0.81, {1, 0, 3}),
        (0.96, {1, 0, 3, 2}),
        (1.0, {1, 0, 3, 2}),
    ],
)
def test_nucleus_ends_with_the_token_that_crosses_the_share(
    top_p: float, nucleus: set[int]
) -> None:
    assert set(draws(2000, 1.0, top_p)) == nucleus


def test_seed_makes_draws_repeatable_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    assert draws(50, 1.0, seed=7) == draws(50, 1.0, seed=7) != draws(50, 1.0, seed=8)
    assert torch.equal(torch.random.get_rng_state(), before)


@given(
    st.lists(st.floats(-60, 60), min_size=1, max_size=20),
    st.floats(0.01, 10),
    st.floats(0.001, 1.0),
)
def test_every_draw_is_a_token_of_the_nucleus(
    logits: list[float], temperature: float, top_p: float
) -> None:
    row = torch.tensor(logits)
    token = Sampler(Sampling(temperature, top_p)).choose(row)
    likelier = torch.softmax(row / temperature, dim=-1)
    # The tokens before the drawn one hold less than the share.
    assert float(likelier[likelier > likelier[token]].sum()) < top_p + 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1,), "temperature is -0.1; it must be finite and 0 or more."),
        ((1.0, 0.0), "top_p is 0.0; it must lie above 0 and be at most 1."),
        ((1.0, 1.5), "top_p is 1.5; it must lie above 0 and be at most 1."),
        ((float("nan"),), "temperature is nan; it must be finite and 0 or more."),
        ((float("inf"),), "temperature is inf; it must be finite and 0 or more."),
        ((1.0, float("nan")), "top_p is nan; it must lie above 0 and be at most 1."),
    ],
)
def test_values_out_of_range(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30, True, 1.0, "1", None])
def test_seeds_that_no_generator_takes(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed must be a whole number from 0 to 9223372036854"):
        Sampling(0.5, 1.0, seed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_choose_nothing(temperature: float) -> None:
    row = torch.tensor([0.0, math.nan, 1.0])
    with pytest.raises(ArtifactError, match=r"no numbers \(NaN\)"):
        Sampler(Sampling(temperature)).choose(row)
