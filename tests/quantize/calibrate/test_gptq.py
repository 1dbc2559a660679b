"""GPTQ against the formula that it is a fast form of, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.quantize.calibrate import hessian as hessians
from llm_coreml.quantize.calibrate.gptq import gptq
from llm_coreml.quantize.calibrate.hessian import DAMPING, Hessian
from llm_coreml.quantize.formats.grids import CodebookGrid, Grid, IntegerGrid, grid_of
from llm_coreml.quantize.formats.round import quantized
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Scheme, Unquantized

SCHEMES: dict[str, Scheme] = {
    "int4-group": IntGroup(4, 8),
    "int4-channel": IntChannel(4),
    "int8-channel": IntChannel(8),
    "int4-group-int": IntGroup(4, 16, zero_point="int"),
    "int3-group-float": IntGroup(3, 8, zero_point="float"),
    "codebook-4": Codebook(4, 4),
    "codebook-3-blocks": Codebook(3, 4, columns=48),
    "codebook-2": Codebook(2, 2),
}
ROWS = 8
# More columns than are updated in one go.
COLUMNS = 144


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return SCHEMES[request.param]


def problem(
    seed: int, rows: int = ROWS, columns: int = COLUMNS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix and correlated inputs for it, a few of them much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mixing *= torch.linspace(0.1, 1.5, columns, dtype=torch.float64).exp().unsqueeze(1)
    return weight, torch.randn(4 * columns, columns, generator=generator).double() @ mixing


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def factored(moment: torch.Tensor) -> Hessian:
    return Hessian.of(moment.clone())


def flat_grid(scheme: Scheme, weight: torch.Tensor) -> Grid:
    return grid_of(scheme, weight, torch.ones(weight.shape[1], dtype=weight.dtype))


def nearest(grid: Grid, column: int, value: float, row: int) -> float:
    """Return the number nearest to `value` that the grid has for an element."""
    if isinstance(grid, CodebookGrid):
        rows = ROWS // len(grid.tables)
        numbers = grid.tables[row // rows, column // grid.columns].numpy()
    else:
        assert isinstance(grid, IntegerGrid)
        top, group = 2 ** (grid.bits - 1), column // grid.group_size
        zero = 0.0 if grid.zero_point is None else float(grid.zero_point[row, group])
        numbers = (np.arange(-top, top) - zero) * float(grid.scale[row, group])
    return float(numbers[np.abs(numbers - value).argmin()])


def surgeon(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> np.ndarray:
    """Quantize row by row and column by column, each time with the inverse of what is left.

    The Optimal Brain Surgeon: the error of a column is made up for by `H^-1 e_j` of all columns
    that are not fixed yet, and a fixed one is eliminated from the inverse.
    """
    h = hessian.numpy()
    h = h + DAMPING * h.diagonal().mean() * np.eye(len(h))
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    result = weight.numpy().copy()
    for row, values in enumerate(result):
        inverse = np.linalg.inv(h)
        for column in order:
            fixed = nearest(grid, int(column), values[column], row)
            change = (values[column] - fixed) / inverse[column, column] * inverse[:, column]
            values -= change
            values[column] = fixed
            inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
            inverse[column] = inverse[:, column] = 0
            inverse[column, column] = 1  # its change is zero from here on
    return result


def stored(grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([grid.values(j, codes[:, j]) for j in range(codes.shape[1])], 1)


def output_error(weight: torch.Tensor, dense: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (weight - dense.double()).T).square().sum())


def test_codes_are_those_of_the_textbook(scheme: Scheme) -> None:
    weight, inputs = problem(seed=0)
    grid, hessian = flat_grid(scheme, weight), hessian_of(inputs)
    found = stored(grid, gptq(weight, factored(hessian), grid)).numpy()
    np.testing.assert_allclose(found, surgeon(weight, hessian, grid), rtol=1e-9, atol=1e-12)


def test_products_keep_their_values_better_than_rounded_to_nearest(scheme: Scheme) -> None:
    shares = []
    for seed in range(5):
        weight, inputs = problem(seed)
        hessian = hessian_of(inputs)
        grid = grid_of(scheme, weight, hessian.diagonal())
        found = grid.tensor(gptq(weight, factored(hessian), grid)).dequantize()
        rounded = quantized(scheme, weight.float()).dequantize()
        shares.append(output_error(weight, found, inputs) / output_error(weight, rounded, inputs))
    assert max(shares) < 1
    assert sum(shares) / len(shares) < 0.6


def test_inputs_that_say_nothing_leave_rounding_to_nearest(scheme: Scheme) -> None:
    weight, _ = problem(seed=1)
    grid = flat_grid(scheme, weight)
    codes = gptq(weight, factored(torch.eye(COLUMNS, dtype=torch.float64)), grid)
    for column in range(COLUMNS):
        assert torch.equal(codes[:, column], grid.nearest(column, weight[:, column]).to(codes))


def test_columns_that_no_input_reaches_are_rounded_to_nearest(scheme: Scheme) -> None:
    weight, inputs = problem(seed=2)
    dead = torch.tensor([0, 17, COLUMNS - 1])
    inputs[:, dead] = 0
    grid = flat_grid(scheme, weight)
    codes = gptq(weight, factored(hessian_of(inputs)), grid)
    for column in dead.tolist():
        assert torch.equal(codes[:, column], grid.nearest(column, weight[:, column]).to(codes))
    others = [column for column in range(COLUMNS) if column not in dead]
    assert any(
        not torch.equal(codes[:, column], grid.nearest(column, weight[:, column]).to(codes))
        for column in others
    )


def test_inputs_of_zero_only_are_rounded_to_nearest() -> None:
    weight, _ = problem(seed=2)
    grid = flat_grid(IntGroup(4, 8), weight)
    codes = gptq(weight, factored(torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)), grid)
    assert torch.equal(codes[:, 5], grid.nearest(5, weight[:, 5]))


def test_fewer_inputs_than_columns_are_enough() -> None:
    weight, inputs = problem(seed=3)
    inputs = inputs[:10]
    grid, hessian = flat_grid(IntGroup(4, 8), weight), hessian_of(inputs)
    found = stored(grid, gptq(weight, factored(hessian), grid))
    rounded = quantized(IntGroup(4, 8), weight.float()).dequantize()
    assert output_error(weight, found, inputs) < 0.5 * output_error(weight, rounded, inputs)


def test_damping_grows_until_the_hessian_can_be_factored() -> None:
    weight, inputs = problem(seed=4)
    hessian = hessian_of(inputs)
    # As rounding may leave it: an eigenvalue below zero, beyond what the first damping lifts.
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.05 * float(hessian.diagonal().mean())
    broken = vectors @ torch.diag(values) @ vectors.T
    grid = flat_grid(IntGroup(4, 8), weight)
    found = stored(grid, gptq(weight, factored(broken), grid))
    rounded = quantized(IntGroup(4, 8), weight.float()).dequantize()
    assert output_error(weight, found, inputs) < output_error(weight, rounded, inputs)


def test_a_hessian_beyond_repair_is_refused() -> None:
    with pytest.raises(CheckpointError, match="give another text"):
        Hessian.of(-torch.eye(COLUMNS))


def test_the_factor_solves_and_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessians, "_STRIP", 64)
    weight, inputs = problem(seed=6)
    inputs[:, 3] = 0
    wanted = hessian_of(inputs)
    mean = wanted.diagonal().mean()
    wanted += DAMPING * mean * torch.eye(COLUMNS, dtype=torch.float64)
    wanted[3, 3] = mean  # no input says anything of it
    hessian = factored(hessian_of(inputs))
    torch.testing.assert_close(hessian.matrix, wanted, rtol=1e-12, atol=0)
    found = hessian.solve(weight).numpy()
    np.testing.assert_allclose(found, weight.numpy() @ np.linalg.inv(wanted.numpy()), rtol=1e-9)
    product = hessian.back(hessian.root(weight))
    torch.testing.assert_close(product, weight @ wanted, rtol=1e-9, atol=1e-9)
    narrow = factored(hessian_of(inputs).float()).solve(weight.float())
    away = (narrow.double() - hessian.solve(weight)).norm() / hessian.solve(weight).norm()
    assert float(away) < 1e-4


def test_single_precision_chooses_nearly_the_same_codes(scheme: Scheme) -> None:
    weight, inputs = problem(seed=7)
    grid, hessian = flat_grid(scheme, weight), hessian_of(inputs)
    narrow_grid = flat_grid(scheme, weight.float())
    found = stored(grid, gptq(weight, factored(hessian), grid))
    codes = gptq(weight.float(), factored(hessian.float()), narrow_grid)
    narrow = stored(narrow_grid, codes)
    wide_error = output_error(weight, found, inputs)
    assert output_error(weight, narrow, inputs) == pytest.approx(wide_error, rel=0.02)


def test_a_grid_holds_what_the_artifact_holds(scheme: Scheme) -> None:
    weight, inputs = problem(seed=5)
    weight[:, :8] = 0
    grid = grid_of(scheme, weight.float(), hessian_of(inputs).diagonal().float())
    codes = gptq(weight.float(), factored(hessian_of(inputs).float()), grid)
    tensor = grid.tensor(codes)
    assert type(tensor) is type(quantized(scheme, weight.float()))
    assert torch.equal(tensor.dequantize(), stored(grid, codes))
    numbers = grid.tables if isinstance(grid, CodebookGrid) else grid.scale
    assert torch.equal(numbers, numbers.half().float())


def test_a_scale_minds_the_columns_that_matter() -> None:
    weight = torch.tensor([[100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    flat = grid_of(IntGroup(4, 8), weight, torch.ones(8))
    uneven = grid_of(IntGroup(4, 8), weight, torch.tensor([1e-6, 1, 1, 1, 1, 1, 1, 1]))
    assert isinstance(flat, IntegerGrid) and isinstance(uneven, IntegerGrid)
    assert abs(float(uneven.scale)) < 0.8 * abs(float(flat.scale))


def test_weights_without_codes_and_scales_beyond_fp16_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no codes"):
        grid_of(Unquantized(), torch.ones(2, 8), torch.ones(8))
    with pytest.raises(UnsupportedError, match="fp16 cannot hold"):
        grid_of(IntGroup(4, 8), torch.full((2, 8), 1e9), torch.ones(8))
