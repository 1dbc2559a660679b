"""Quantizers without data: exact where weights fit the format, and near the best where not."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.grids import grid_of
from llm_coreml.quantize.formats.integers import integers
from llm_coreml.quantize.formats.mxfp4 import mxfp4
from llm_coreml.quantize.formats.round import quantized
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Mxfp4, Scheme
from llm_coreml.quantize.formats.tensors import integer_tensor, lookup_tensor
from llm_coreml.quantize.formats.vectors import kmeans_vectors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
    dense: Any = quantized(scheme, weight)
    values: torch.Tensor = dense.dequantize()
    return values


def loss(scheme: Scheme, weight: torch.Tensor) -> float:
    return float((stored(scheme, weight) - weight).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", ["none", "int", "float"])
def test_weights_on_a_grid_are_stored_exactly(bits: int, kind: Any) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    random = np.random.default_rng(bits)
    codes = random.integers(low, high, (6, 64), endpoint=True)
    codes[:, ::16], codes[:, 1::16] = low, high
    zero = {"none": 0, "int": high, "float": 0.5 - high}[kind]
    weight = torch.from_numpy((codes - zero) * 2.0**-5).to(torch.float32)
    found, scale, zero_point = integers(weight, bits, 16, kind)
    held: Any = integer_tensor(found, scale, zero_point, bits)
    assert torch.equal(held.dequantize(), weight)
    assert found.dtype == torch.int8 and np.array_equal(found.numpy(), codes)
    assert bool((scale == 2.0**-5).all())
    assert zero_point is None if kind == "none" else bool((zero_point == zero).all())


@pytest.mark.parametrize("kind", ["none", "int", "float"])
def test_integers_come_near_the_best_scale_and_zero_point(kind: Any) -> None:
    weight = normal(8, 16) + (0.0 if kind == "none" else 0.7)
    codes, scale, zero = integers(weight, 3, 16, kind)
    shift = 0 if zero is None else zero.to(torch.float32)
    errors = ((codes - shift) * scale - weight).square().sum(1)
    zeros = {"none": np.zeros(1), "int": np.arange(-4, 4), "float": np.linspace(-6, 6, 49)}[kind]
    tried = torch.full((8,), torch.inf)
    for step, shift in itertools.product(np.linspace(0.05, 1.5, 120), zeros):
        nearest = (weight / step + shift).round().clamp(-4, 3)
        tried = tried.minimum(((nearest - shift) * step - weight).square().sum(1))
    assert bool((errors < 1.35 * tried).all()), errors / tried
    assert errors.sum() < 1.15 * tried.sum()


def test_zero_points_help_weights_that_are_off_centre() -> None:
    weight = normal(32, 64) + 2
    kinds: tuple[Any, ...] = ("none", "int", "float")
    for bits in (3, 4, 8):
        none, whole, real = (loss(IntGroup(bits, 32, zero_point=kind), weight) for kind in kinds)
        assert real < whole < none
    per_row = [loss(IntChannel(8, zero_point=kind), weight) for kind in kinds]
    assert per_row == sorted(per_row, reverse=True)


def test_groups_without_a_range_are_held() -> None:
    weight = torch.tensor([[0.0] * 8, [0.37] * 8, [-1000.0] * 8, [1e-6] * 8])
    for kind in ("none", "int", "float"):
        dense = stored(IntGroup(3, 8, zero_point=kind), weight)
        assert torch.allclose(dense, weight, rtol=2e-3, atol=4e-5), kind
        assert bool((dense[0] == 0).all())


def test_a_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="a weight is 1e\\+06, whose scale fp16 cannot hold"):
        quantized(IntGroup(3, 8), torch.full((1, 8), 1e6))


def blocks(rows: int, columns: int, scheme: Codebook) -> torch.Tensor:
    """Return a matrix that has as few values in each block as the tables have."""
    random = np.random.default_rng(7)
    row_groups, column_groups = scheme.tables((rows, columns))
    sizes = (row_groups, column_groups, 2**scheme.bits, scheme.vector)
    tables = random.normal(size=sizes).astype(np.float16).astype(np.float32)
    codes = random.integers(0, 2**scheme.bits, (rows // scheme.vector, columns))
    row, column = np.arange(rows)[:, None], np.arange(columns)[None]
    places = row * row_groups // rows, column * column_groups // columns
    return torch.from_numpy(
        tables[(*places, codes[row // scheme.vector, column], row % scheme.vector)]
    )


@pytest.mark.parametrize(
    "scheme",
    [
        Codebook(2, None, columns=8),
        Codebook(3, 8, columns=16),
        Codebook(2, None),
        Codebook(3, 8, vector=2),
        Codebook(2, 16, columns=16, vector=4),
    ],
)
def test_blocks_of_few_values_are_stored_exactly(scheme: Codebook) -> None:
    weight = blocks(32, 48, scheme)
    assert torch.equal(stored(scheme, weight), weight)


def test_a_scale_for_each_row_helps_rows_of_different_size() -> None:
    weight = normal(32, 64) * torch.logspace(-2, 1, 32).unsqueeze(1)
    plain, scaled = (loss(Codebook(3, 16, row_scale=scale), weight) for scale in (False, True))
    assert scaled < 0.8 * plain
    relative = (stored(Codebook(3, 16, row_scale=True), weight) - weight).norm(dim=1)
    assert bool((relative < 0.3 * weight.norm(dim=1)).all())
    assert bool((stored(Codebook(3, 16, row_scale=True), weight * 0) == 0).all())


def test_a_shared_table_serves_the_rows_that_matter() -> None:
    large, small = normal(8, 256).erf() * 10, normal(8, 256).pow(3) * 0.01
    scheme = Codebook(3, 16, row_scale=True)
    alone = loss(Codebook(3, 8, row_scale=True), large)
    assert loss(scheme, torch.cat((large, small))) < 1.05 * alone


def test_vectors_end_where_further_steps_win_nothing() -> None:
    values = normal(3, 900, 2)
    tables, codes = kmeans_vectors(values, 4)
    found = (tables.gather(1, codes.long().unsqueeze(2).expand_as(values)) - values).square().sum()
    further = 0.0
    for points, centres in zip(values.numpy(), tables.numpy(), strict=True):
        for _ in range(100):
            distances = np.square(points[:, None] - centres).sum(2)
            nearest = distances.argmin(1)
            centres = np.stack([points[nearest == at].mean(0) for at in range(16)])
        further += distances.min(1).sum()
    assert found < 1.02 * further


def test_vectors_come_near_the_best_table() -> None:
    values = normal(20, 7, 2)
    tables, codes = kmeans_vectors(values, 1)
    found = (tables.gather(1, codes.long().unsqueeze(2).expand_as(values)) - values).square()
    best = torch.full((20,), torch.inf)
    for chosen in itertools.product((False, True), repeat=6):
        one = torch.tensor([False, *chosen])
        error = torch.zeros(20)
        for part in (values[:, one], values[:, ~one]):
            if part.shape[1]:
                error += (part - part.mean(1, keepdim=True)).square().sum((1, 2))
        best = best.minimum(error)
    ratio = found.sum((1, 2)) / best
    assert bool((ratio > 0.999).all()) and float(ratio.mean()) < 1.1


def test_pairs_beat_single_values_of_as_many_bits_where_rows_go_together() -> None:
    first = normal(64, 128)
    weight = torch.stack((first, first + 0.3 * normal(64, 128, seed=1)), 1).reshape(128, 128)
    pairs, single = Codebook(6, None, vector=2), Codebook(3, None)
    assert pairs.bits_per_weight((128, 128)) < 1.1 * single.bits_per_weight((128, 128))
    assert loss(pairs, weight) < 0.6 * loss(single, weight)


def test_vectors_are_the_same_every_time_and_for_every_group_alone() -> None:
    values = normal(5, 600, 4)
    tables, codes = kmeans_vectors(values, 4)
    again = kmeans_vectors(values[2:3], 4)
    assert torch.equal(tables[2:3], again[0]) and torch.equal(codes[2:3], again[1])
    assert torch.equal(tables, tables.half().float())
    distances = (values.unsqueeze(2) - tables.unsqueeze(1)).square().sum(3)
    nearest = distances.gather(2, codes.long().unsqueeze(2)).squeeze(2)
    assert torch.allclose(nearest, distances.amin(2), rtol=1e-4, atol=1e-6)
    for bad in (float("nan"), 1e5):
        values[1, 2, 3] = bad
        with pytest.raises(UnsupportedError, match="a codebook holds fp16 numbers"):
            kmeans_vectors(values, 4)


def test_mxfp4_takes_the_best_of_two_exponents() -> None:
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    weight = normal(16, 96) * torch.logspace(-3, 3, 16).unsqueeze(1)
    weight[0] = 0
    codes, exponents = mxfp4(weight)
    assert codes.dtype == torch.uint8 and exponents.shape == (16, 3)
    dense = stored(Mxfp4(), weight)
    for row, group in itertools.product(range(16), range(3)):
        values = weight[row, 32 * group : 32 * group + 32].double().numpy()
        held = dense[row, 32 * group : 32 * group + 32].double().numpy()
        largest = np.abs(values).max()
        first = int(np.floor(np.log2(largest))) - 2 if largest else 0
        errors = []
        for exponent in (first, first + 1):
            grid = magnitudes * 2.0**exponent
            errors.append(np.square(np.abs(np.abs(values)[:, None] - grid).min(1)).sum())
        assert np.square(held - values).sum() == pytest.approx(min(errors), rel=1e-5)
    assert torch.equal(stored(Mxfp4(), dense), dense)


def test_calibration_makes_the_same_tensors() -> None:
    weight = normal(16, 32)
    grid = grid_of(IntGroup(3, 16), weight, torch.ones(32))
    codes = torch.stack([grid.nearest(at, weight[:, at]) for at in range(32)], 1)
    dense = torch.stack([grid.values(at, codes[:, at]) for at in range(32)], 1)
    held: Any = grid.tensor(codes)
    assert torch.equal(held.dequantize(), dense)
    for scheme in (
        Codebook(2, 8, vector=2),
        Codebook(2, 8, row_scale=True),
        Mxfp4(),
    ):
        with pytest.raises(UnsupportedError, match="calibrat"):
            grid_of(scheme, weight, torch.ones(32))


def test_a_looked_up_weight_serves_linear_layers_and_tables() -> None:
    codes = torch.arange(32, dtype=torch.uint8).view(4, 8) % 4
    weight = lookup_tensor(codes, normal(1, 1, 4, 2), 2, None, None)
    assert weight.shape == (8, 8)
    dense: Any = weight
    dense, x, tokens = dense.dequantize(), normal(3, 8), torch.tensor([0, 7, 3])
    linear, embedding = torch.nn.functional.linear, torch.nn.functional.embedding
    assert torch.equal(linear(x, weight), x @ dense.T)
    assert torch.equal(linear(x, weight, bias=x[0]), linear(x, dense, x[0]))
    assert torch.equal(embedding(tokens, weight), dense[tokens])
    assert torch.equal(linear(x, weight.detach().clone()), x @ dense.T)
