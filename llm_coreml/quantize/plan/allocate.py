"""Give every matrix one of several formats, so that the sum of losses is small within a budget.

    chosen = allocate([[Option(2.1e6, 3e-3), Option(3.1e6, 8e-4)], ...], budget)

This is the knapsack problem with one choice per item. On the convex hull of an item's options the
loss falls ever slower with size, so taking the steepest steps first is optimal for every budget at
which it ends exactly (Lagrange multipliers: Everett, Operations Research 11, 1963; in quantization
Shoham and Gersho, IEEE Trans. ASSP 36, 1988). What is left over is spent on whatever fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """One way to store a matrix.

    Attributes:
        bits: What it takes.
        loss: What it costs in quality; not negative.
    """

    bits: int
    loss: float


class _Step(NamedTuple):
    """An edge of an item's hull; sorts by falling gain per bit, then in the items' order."""

    rate: float
    item: int
    option: int


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose an option of every item.

    The loss is above the least possible by less than the gain of a single step along a hull.

    Args:
        items: Options of every item, in any order.
        budget: Bits that all choices may take together.

    Returns:
        The index of each item's option; equal inputs give equal choices.

    Raises:
        ValueError: the smallest options take more than the budget.
    """
    hulls = [_hull(options) for options in items]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(options[at].bits for options, at in zip(items, chosen, strict=True))
    if left < 0:
        raise ValueError(f"the budget of {budget} bits is {-left} less than the smallest options")
    blocked: set[int] = set()
    for step in sorted(step for item in range(len(items)) for step in _steps(items, hulls, item)):
        cost = items[step.item][step.option].bits - items[step.item][chosen[step.item]].bits
        if step.item in blocked or cost > left:
            blocked.add(step.item)
            continue
        chosen[step.item] = step.option
        left -= cost
    _spend(items, chosen, left)
    return chosen


def _hull(options: Sequence[Option]) -> list[int]:
    """Return the indices of the options on the lower convex hull, by rising size."""
    hull: list[int] = []
    for at in sorted(range(len(options)), key=lambda i: (options[i], i)):
        if hull and options[at].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _rate(options, hull[-2], hull[-1]) <= _rate(options, hull[-1], at):
            hull.pop()
        hull.append(at)
    return hull


def _rate(options: Sequence[Option], small: int, large: int) -> float:
    """Return the loss saved per bit."""
    (bits, loss), (more, less) = options[small], options[large]
    return (loss - less) / (more - bits)


def _steps(items: Sequence[Sequence[Option]], hulls: list[list[int]], item: int) -> list[_Step]:
    edges = pairwise(hulls[item])
    return [_Step(-_rate(items[item], small, large), item, large) for small, large in edges]


def _spend(items: Sequence[Sequence[Option]], chosen: list[int], left: int) -> None:
    """Take the largest gains that still fit, off the hulls too, until none does."""
    while True:
        gains = [
            (options[chosen[item]].loss - option.loss, -item, -at)
            for item, options in enumerate(items)
            for at, option in enumerate(options)
            if option.bits - options[chosen[item]].bits <= left
        ]
        gain, item, at = max(gains)
        if gain <= 0:
            return
        left -= items[-item][-at].bits - items[-item][chosen[-item]].bits
        chosen[-item] = -at
