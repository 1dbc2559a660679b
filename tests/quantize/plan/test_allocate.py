"""The knapsack: within the budget, near the best that any choice gives, the same every time."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_coreml.quantize.plan.allocate import Option, allocate

Items = list[list[Option]]
ITEMS = st.lists(
    st.lists(
        st.builds(Option, st.integers(1, 40), st.floats(0, 10).map(lambda loss: round(loss, 2))),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


def bits(items: Items, chosen: list[int]) -> int:
    return sum(options[at].bits for options, at in zip(items, chosen, strict=True))


def loss(items: Items, chosen: list[int]) -> float:
    return sum(options[at].loss for options, at in zip(items, chosen, strict=True))


def best(items: Items, budget: int) -> float:
    """Return the least loss of all choices that fit."""
    choices = itertools.product(*(range(len(options)) for options in items))
    return min(loss(items, list(c)) for c in choices if bits(items, list(c)) <= budget)


@given(ITEMS, st.integers(0, 100))
def test_a_choice_fits_and_is_near_the_best(items: Items, extra: int) -> None:
    budget = sum(min(option.bits for option in options) for options in items) + extra
    chosen = allocate(items, budget)
    assert bits(items, chosen) <= budget
    largest = max(max(o.loss for o in options) - min(o.loss for o in options) for options in items)
    assert loss(items, chosen) <= best(items, budget) + largest + 1e-9
    # Nothing that would lose less fits into what is left.
    for item, options in enumerate(items):
        for at, option in enumerate(options):
            other = [*chosen[:item], at, *chosen[item + 1 :]]
            assert bits(items, other) > budget or option.loss >= options[chosen[item]].loss


def test_where_steps_are_small_the_choice_is_the_best() -> None:
    """Losses of 4^-bits, as quantization has them, with sensitivities far apart."""
    draw = random.Random(0)
    for _ in range(20):
        scales = [10 ** draw.uniform(-2, 2) for _ in range(6)]
        items = [[Option(b, scale * 4.0**-b) for b in (2, 3, 4, 6)] for scale in scales]
        for budget in (15, 18, 24, 30):
            found = loss(items, allocate(items, budget))
            assert found <= 1.3 * best(items, budget)


def test_sensitive_matrices_get_the_bits() -> None:
    items = [[Option(b, scale * 4.0**-b) for b in (2, 3, 4)] for scale in (1.0, 100.0, 1.0)]
    assert allocate(items, 8) == [0, 2, 0]


def test_worse_and_larger_options_are_left_alone() -> None:
    items = [[Option(10, 0.5), Option(10, 0.4), Option(12, 0.4), Option(13, 0.9)]]
    assert allocate(items, 100) == [1]


def test_options_off_the_hull_use_up_what_is_left() -> None:
    # The second option is no corner of the hull from the first to the third, which does not fit.
    items = [[Option(10, 1.0), Option(14, 0.9), Option(20, 0.0)]]
    assert allocate(items, 15) == [1]


def test_a_budget_below_the_smallest_options_is_refused() -> None:
    with pytest.raises(ValueError, match="19 bits is 1 less than the smallest options"):
        allocate([[Option(10, 1.0)], [Option(10, 1.0), Option(20, 0.0)]], 19)
