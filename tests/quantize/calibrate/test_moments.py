"""Sums over a text against the same in double precision."""

from __future__ import annotations

import pytest
import torch

from llm_coreml.quantize.calibrate import moments
from llm_coreml.quantize.calibrate.hessian import DAMPING
from llm_coreml.quantize.calibrate.moments import Moments, Sums


def summed(
    weight: torch.Tensor, inputs: torch.Tensor, others: torch.Tensor, window: int
) -> Moments:
    sums = Sums(weight)
    for pair in zip(inputs.split(window), others.split(window), strict=True):
        sums.add(*pair)
    return sums.means()


@pytest.mark.parametrize("rows", [5, 11, 30])  # fewer than half of the columns, and more
def test_means_are_those_of_all_windows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_STRIP", 8)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, 22, generator=generator)
    inputs = 3 * torch.randn(70, 22, generator=generator)
    others = inputs + 0.1 * torch.randn(70, 22, generator=generator)
    hessian, drift, of_outputs = summed(weight, inputs, others, 32)
    wide, away = inputs.double(), others.double() - inputs
    if of_outputs:
        away = away @ weight.double().T
    mean = wide.square().mean()
    torch.testing.assert_close(hessian, (wide.T @ wide / 70 / mean).float())
    assert of_outputs == (rows < 11)
    torch.testing.assert_close(drift, (away.T @ wide / 70 / mean).float(), rtol=1e-4, atol=1e-5)


def test_inputs_of_zero_only_leave_zeros() -> None:
    nothing = torch.zeros(4, 6)
    hessian, drift, _ = summed(torch.ones(3, 6), nothing, nothing, 4)
    assert not hessian.any() and not drift.any()


# Of short windows there are more to add.
@pytest.mark.parametrize("window", [32, pytest.param(4096, marks=pytest.mark.exhaustive)])
def test_what_single_precision_loses_is_far_below_the_damping(window: int) -> None:
    generator = torch.Generator().manual_seed(1)
    # As activations are: outlying channels, most of them far from zero, many tokens alike.
    inputs = torch.randn(200_000, 256, generator=generator)
    inputs += 2 * torch.randn(256, generator=generator)
    inputs[:, :3] *= 300
    hessian, *_ = summed(torch.zeros(256, 256), inputs, inputs, window)
    wide = inputs.double()
    exact = wide.T @ wide / wide.square().sum(0).mean()
    off = torch.linalg.matrix_norm(hessian.double() - exact, ord=2)
    # In units of the mean diagonal, as the damping is: here the trace is the number of columns.
    assert 0 < float(off) < 1e-6 * 256 < 0.01 * DAMPING
