"""Tables are near the optimum that an independent dynamic program finds, whatever the values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.kmeans import kmeans

SORTED, BINNED = 1500, 20000  # numbers of values that take the one way and the other


def optimum(values: torch.Tensor, entries: int, weights: torch.Tensor | None = None) -> float:
    """Return the least squared error of one group, over all ways to cut its distinct values."""
    points, place = np.unique(values.double().numpy(), return_inverse=True)
    counts = np.ones(len(values)) if weights is None else weights.double().numpy()
    weight = np.bincount(place, counts)
    points = points - np.average(points, weights=weight)
    sums = [np.concatenate(([0.0], np.cumsum(weight * points**power))) for power in range(3)]
    # cost[i, j]: squared error about their mean of the points from i up to, without, j.
    total, first, second = (each[None, :] - each[:, None] for each in sums)
    cost = second - np.divide(first**2, total, out=np.zeros_like(total), where=total > 0)
    cost = np.where(np.tri(len(sums[0]), dtype=bool).T, np.maximum(cost, 0), np.inf)
    best = cost[0]
    for _ in range(entries - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


def error(
    values: torch.Tensor,
    tables: torch.Tensor,
    codes: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared error of each group, fp64."""
    squares = (tables.double().gather(1, codes.long()) - values.double()).square()
    return (squares if weights is None else squares * weights.double()).sum(1)


def rounding(values: torch.Tensor, weight: float) -> float:
    """Return what rounding the means of `values` to fp16 may add to a squared error."""
    largest = np.float16(float(values.abs().max()))
    return weight * (float(np.spacing(largest)) / 2) ** 2


def assert_sound(values: torch.Tensor, tables: torch.Tensor, codes: torch.Tensor) -> None:
    """Entries ascend and are fp16 numbers, and no other is nearer than the coded one."""
    assert tables.dtype == torch.float32 and codes.dtype == torch.uint8
    assert torch.equal(tables, tables.half().float())
    assert (tables.diff(dim=1) >= 0).all()
    for row, table, code in zip(values.double(), tables.double(), codes.long(), strict=True):
        distance = (row[:, None] - table).abs()
        chosen = distance.gather(1, code[:, None])[:, 0]
        assert (chosen <= distance.amin(1) + 1e-6 * row.abs()).all()


def shaped(kind: str, n: int) -> torch.Tensor:
    """Return two groups of `n` values on a grid so coarse that `optimum` can look at all."""
    random = np.random.default_rng(3)
    values = {
        "gaussian": lambda: random.standard_normal((2, n)),
        "heavy tails": lambda: np.clip(random.standard_t(3, (2, n)), -60, 60),
        "two heaps": lambda: random.standard_normal((2, n)) / 4 + random.choice([-3, 5], (2, n)),
        "mostly zero": lambda: random.standard_normal((2, n)) * (random.random((2, n)) > 0.9),
        "one side": lambda: random.exponential(1, (2, n)),
        "far from zero": lambda: 20 + random.standard_normal((2, n)),
    }[kind]()
    return torch.from_numpy(np.round(values * 64) / 64).float()


KINDS = ("gaussian", "heavy tails", "two heaps", "mostly zero", "one side", "far from zero")


@given(
    numbers=st.lists(
        st.tuples(st.integers(-2000, 2000), st.integers(0, 5)), min_size=1, max_size=40
    ),
    exponent=st.integers(-12, 4),
    bits=st.integers(1, 5),
    weighted=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_few_values_get_the_best_table(
    numbers: list[tuple[int, int]], exponent: int, bits: int, weighted: bool
) -> None:
    values = torch.tensor([[float(number) * 2.0**exponent for number, _ in numbers]])
    weights = torch.tensor([[float(weight) for _, weight in numbers]]) if weighted else None
    tables, codes = kmeans(values, bits, weights)
    assert_sound(values, tables, codes)
    counted = weights if weights is not None and weights.any() else torch.ones_like(values)
    best = optimum(values[0], 2**bits, counted[0])
    slack = rounding(values, float(counted.sum()))
    assert float(error(values, tables, codes, counted)) <= best * (1 + 1e-5) + slack


@pytest.mark.parametrize("bits", [1, 3, 4])
@pytest.mark.parametrize("n", [SORTED, BINNED])
@pytest.mark.parametrize("kind", KINDS)
def test_many_values_get_nearly_the_best_table(kind: str, n: int, bits: int) -> None:
    values = shaped(kind, n)
    tables, codes = kmeans(values, bits)
    assert_sound(values, tables, codes)
    for group, found in zip(values, error(values, tables, codes), strict=True):
        assert found <= 1.005 * optimum(group, 2**bits) + rounding(group, n)


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("n", [SORTED, BINNED])
def test_large_tables_are_near_the_best(n: int, bits: int) -> None:
    values = shaped("gaussian", n)[:1] / 4096  # there fp16 rounds little
    tables, codes = kmeans(values, bits)
    assert_sound(values, tables, codes)
    best = optimum(values[0], 2**bits)
    assert error(values, tables, codes) <= 1.02 * best + rounding(values, n)


@pytest.mark.parametrize("n", [SORTED, BINNED])
def test_values_far_outside_get_entries_of_their_own(n: int) -> None:
    values = shaped("gaussian", n)
    values[0, 7] = 10000.0
    values[1, [1, n // 2, n - 1]] = torch.tensor([-30000.0, 24992.0, 25600.0])
    tables, codes = kmeans(values, 3)
    assert_sound(values, tables, codes)
    for group, table, found in zip(values, tables, error(values, tables, codes), strict=True):
        assert found <= 1.005 * optimum(group, 8)
        assert set(group[group.abs() > 1000].tolist()) <= set(table.tolist())


@pytest.mark.parametrize("n", [1, 5, SORTED, BINNED])
@pytest.mark.parametrize("distinct", [1, 3, 16])
def test_as_many_values_as_entries_are_kept(n: int, distinct: int) -> None:
    palette = torch.tensor([0.0, -0.1, 0.1, 0.30005, 7.0, -250.0, 1500.0, 2e-3]).half().float()
    palette = torch.cat((palette, palette * 0.37)).half().float()[:distinct]
    values = palette[torch.arange(2 * n).view(2, n) * 7 % distinct]
    tables, codes = kmeans(values, 4)
    assert torch.equal(tables.gather(1, codes.long()), values)


@pytest.mark.parametrize("n", [SORTED, BINNED])
def test_a_weight_of_three_is_three_copies(n: int) -> None:
    values = shaped("heavy tails", n)
    weights = torch.from_numpy(np.random.default_rng(4).integers(1, 4, (2, n))).float()
    tables, codes = kmeans(values, 3, weights)
    assert_sound(values, tables, codes)
    for row, weight, found in zip(
        values, weights, error(values, tables, codes, weights), strict=True
    ):
        copies = row.repeat_interleave(weight.long())[None]
        alike = error(copies, *kmeans(copies, 3))
        assert found == pytest.approx(float(alike), rel=5e-3)
        assert found <= 1.005 * optimum(row, 8, weight)


@pytest.mark.parametrize("n", [40, SORTED, BINNED])
@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_weights_count_relative_to_each_other(n: int, unit: float) -> None:
    values = shaped("gaussian", n)
    weights = torch.where(values > 1, 8.0, 1.0)
    tables, codes = kmeans(values, 3, weights)
    assert float(error(values, *kmeans(values, 3), weights).sum()) > 1.05 * float(
        error(values, tables, codes, weights).sum()
    )
    scaled, _ = kmeans(values, 3, weights * unit)
    assert error(values, scaled, kmeans(values, 3, weights * unit)[1], weights).sum() == (
        pytest.approx(float(error(values, tables, codes, weights).sum()), rel=1e-4)
    )


@pytest.mark.parametrize("n", [40, SORTED, BINNED])
def test_weights_of_zero_leave_values_out_and_all_zeros_count_as_one(n: int) -> None:
    values = shaped("gaussian", n)
    weights = torch.ones_like(values)
    weights[0] = 0
    weights[1] = values[1] > 0
    tables, codes = kmeans(values, 2, weights)
    assert_sound(values, tables, codes)
    assert torch.equal(tables[0], kmeans(values[:1], 2)[0][0])
    assert float(error(values[1:], tables[1:], codes[1:], weights[1:])) <= 1.005 * optimum(
        values[1][values[1] > 0], 4
    ) + rounding(values, n)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n", [40, SORTED, BINNED, 270000])
def test_neither_neighbours_nor_threads_nor_layout_matter(n: int) -> None:
    values = torch.randn(4, n, generator=torch.Generator().manual_seed(0)).half()
    values[2, 3] = 10000.0
    torch.set_num_threads(1)
    tables, codes = kmeans(values, 3)
    torch.set_num_threads(2)
    for row in (1, 2, 3):
        alone = kmeans(values[row : row + 1], 3)
        assert torch.equal(alone[0][0], tables[row]) and torch.equal(alone[1][0], codes[row])
    aside = kmeans(values.float().t().contiguous().t(), 3)
    assert torch.equal(aside[0], tables) and torch.equal(aside[1], codes)


def test_more_groups_than_one_piece_are_all_done() -> None:
    values = torch.randn(1100, 33, generator=torch.Generator().manual_seed(0))
    tables, codes = kmeans(values, 2)
    for row in (0, 511, 512, 1099):
        assert torch.equal(kmeans(values[row : row + 1], 2)[0][0], tables[row])
    assert (error(values, tables, codes) < values.square().sum(1) / 4).all()


def test_numbers_too_small_for_fp16_become_its_smallest() -> None:
    values = torch.tensor([[0.0, 1e-9, 2**-24, 2.2 * 2**-24, 9.8e-4]])
    tables, codes = kmeans(values, 2)
    found = tables.gather(1, codes.long())[0]
    assert found[:4].tolist() == [0.0, 0.0, 2**-24, 2**-23]


@pytest.mark.parametrize("n", [4, BINNED])
@pytest.mark.parametrize(
    ("value", "shown"),
    [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf"), (-7e4, "-70000")],
)
def test_what_no_table_holds_is_refused(n: int, value: float, shown: str) -> None:
    values = torch.zeros(3, n)
    values[1, 2] = value
    with pytest.raises(UnsupportedError, match=f"a value is {shown}; .* end at 65504"):
        kmeans(values, 4)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    weights = torch.ones(2, 9)
    weights[1, 1] = weight
    with pytest.raises(UnsupportedError, match=f"a weight is {weight:g}; .* finite and not"):
        kmeans(torch.randn(2, 9), 1, weights)
