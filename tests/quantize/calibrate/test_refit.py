"""What may change of a quantized matrix, and its fit, against the normal equations."""

from __future__ import annotations

import pytest
import torch

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.calibrate.hessian import DAMPING, Alike, Hessian
from llm_coreml.quantize.calibrate.refit import refit
from llm_coreml.quantize.formats.adjustable import adjustable
from llm_coreml.quantize.formats.round import dense_rows, quantized
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Mxfp4, Scheme

SCHEMES: dict[str, Scheme] = {
    "int4-group": IntGroup(4, 16),
    "int4-group-int": IntGroup(4, 16, zero_point="int"),
    "int4-group-float": IntGroup(4, 32, zero_point="float"),
    "int3-group": IntGroup(3, 16),
    "int3-group-float": IntGroup(3, 16, zero_point="float"),
    "int8-channel": IntChannel(8),
    "mxfp4": Mxfp4(),
    "codebook": Codebook(2, 4),
    "codebook-blocks": Codebook(2, 4, columns=32),
    "codebook-vectors": Codebook(4, 8, vector=2),
    "codebook-scaled": Codebook(2, 4, row_scale=True),
}


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return SCHEMES[request.param]


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix and the mean outer product of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 64, generator=generator) + 0.2
    inputs = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return weight, inputs.T @ inputs / 400 / 64


def damped(moment: torch.Tensor) -> torch.Tensor:
    """Return what a fit goes by."""
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment))


def dense(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(dense_rows(weight)))


def error(found: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor) -> float:
    away = (found - target).double()
    return float(((away @ hessian.double()) * away).sum())


def test_the_same_values_give_the_same_weight(scheme: Scheme) -> None:
    weight = quantized(scheme, problem(0)[0])
    free = adjustable(weight)
    torch.testing.assert_close(free.dense(free.values), dense(weight), rtol=1e-6, atol=1e-6)
    # A float zero point is kept as its product with the scale, and rounded once more.
    torch.testing.assert_close(dense(free.rebuilt(free.values)), dense(weight), rtol=0, atol=2e-3)
    assert type(free.rebuilt(free.values)) is type(weight)


def test_other_values_are_what_the_rebuilt_weight_holds(scheme: Scheme) -> None:
    free = adjustable(quantized(scheme, problem(1)[0]))
    changed = tuple(1.25 * value for value in free.values)
    torch.testing.assert_close(
        dense(free.rebuilt(changed)), free.dense(changed), rtol=2e-3, atol=2e-3
    )


def test_the_fit_is_that_of_the_normal_equations(scheme: Scheme) -> None:
    weight, moment = problem(2)
    hessian = damped(moment)
    begun = adjustable(quantized(scheme, weight))
    start = begun.rebuilt(tuple(1.3 * value for value in begun.values))
    found = refit(start, weight, Hessian.of(moment.clone()))
    free = adjustable(start)
    # Every value's column of the least-squares problem, by changing it alone.
    sizes = [value.numel() for value in free.values]
    at_zero = free.dense(tuple(torch.zeros_like(value) for value in free.values))
    columns = []
    for index in range(sum(sizes)):
        flat = torch.zeros(sum(sizes))
        flat[index] = 1
        parts = [
            part.view(value.shape)
            for part, value in zip(flat.split(sizes), free.values, strict=True)
        ]
        columns.append((free.dense(tuple(parts)) - at_zero).double().flatten())
    design = torch.stack(columns, 1)
    root = torch.linalg.cholesky(hessian.double())
    wide = torch.kron(torch.eye(len(weight), dtype=torch.float64), root.T.contiguous())
    wanted = wide @ (weight - at_zero).double().flatten()
    best = torch.linalg.lstsq(wide @ design, wanted, driver="gelsd").solution
    least = float((wide @ design @ best - wanted).square().sum())
    before, after = error(dense(start), weight, hessian), error(dense(found), weight, hessian)
    assert least <= after <= least + 0.03 * (before - least)
    assert least < 0.9 * before


def test_no_part_gets_worse(scheme: Scheme) -> None:
    weight, moment = problem(3)
    hessian = damped(moment)
    # What is perfect already: rounding to fp16 could only harm it.
    start = quantized(scheme, weight)
    target = dense(start).clone()
    target[4:] = weight[4:]
    found = refit(start, target, Hessian.of(moment.clone()))
    parts = len(adjustable(start).values[0])
    before, after = (
        (((dense(w) - target).double() @ hessian.double()) * (dense(w) - target)).view(parts, -1)
        for w in (start, found)
    )
    assert bool((after.sum(1) <= before.sum(1) + 1e-9).all())


def test_columns_without_inputs_do_no_harm() -> None:
    weight, hessian = problem(4)
    hessian[:16] = hessian[:, :16] = 0
    found = refit(quantized(IntGroup(4, 16), weight), weight, Hessian.of(hessian))
    assert bool(torch.isfinite(dense(found)).all())


def test_a_weight_without_codes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no scales and no tables"):
        adjustable(torch.ones(2, 2))


@pytest.mark.parametrize("scheme", [IntGroup(4, 16), Codebook(2, 4)], ids=["scales", "tables"])
def test_what_fp16_cannot_hold_is_not_taken(scheme: Scheme) -> None:
    weight, hessian = problem(5)
    start = quantized(scheme, weight)
    assert refit(start, 1e7 * weight, Hessian.of(hessian)) is start


def test_weights_alone_are_fitted_by_least_squares(scheme: Scheme) -> None:
    """Where nothing is known of inputs; against the answer of `torch.linalg.lstsq`."""
    weight, _ = problem(3)
    tuned = 1.2 * weight + 0.1
    start = quantized(scheme, weight)
    free = adjustable(start)
    found = torch.cat(list(dense_rows(refit(start, tuned, Alike(weight.shape[1])))))
    sizes = [value.numel() for value in free.values]

    def dense(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(torch.split(flat, sizes), free.values, strict=True)
        return free.dense(tuple(part.view(value.shape) for part, value in parts)).flatten()

    at_zero = dense(torch.zeros(sum(sizes)))
    columns = torch.stack([dense(unit) - at_zero for unit in torch.eye(sum(sizes))], dim=1)
    best = torch.linalg.lstsq(columns, (tuned.flatten() - at_zero).unsqueeze(1), driver="gelsd")
    least = (columns @ best.solution).squeeze(1) + at_zero - tuned.flatten()
    error = (found - tuned).square().sum()
    assert error <= 1.01 * least.square().sum() + 1e-6 * tuned.square().sum()
