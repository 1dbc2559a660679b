"""Fit scales and tables to a matrix's products once its codes are chosen.

    weight = refit(weight, target, hessian)

With the codes fixed, the squared error of the products is a quadratic function of scales and table
entries. Where a row has nothing but scales, its normal equations are few, and solved. Elsewhere
conjugate gradients (Hestenes and Stiefel, 1952) find the least value, for all rows or tables at
once, with one product with the Hessian for each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import vjp

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.calibrate.hessian import Alike, Hessian
from llm_coreml.quantize.formats.adjustable import Adjustable, Values, adjustable

_STEPS = 8
# Share of the error that a step has to take away for another to follow.
_ENOUGH = 0.002
# Rows whose equations are set up at a time: their products should fit a core's cache.
_ROWS = 64
# Keeps scales apart that codes, rounded as they are, hardly tell apart; shares of the diagonal.
_RIDGE = 1e-6
# Keeps parts without any error, or any input, from dividing by zero.
_TINY = 1e-30


def refit(weight: torch.Tensor, target: torch.Tensor, hessian: Hessian | Alike) -> torch.Tensor:
    """Return `weight` with the same codes and other scales or tables.

    Args:
        weight: Quantized, `[rows, columns]`.
        target: What it is to come close to, fp32 `[rows, columns]`.
        hessian: fp32, of the columns; `Alike` fits the weights themselves.

    Returns:
        The parts of it whose products with the inputs are no further from those of `target` than
        `weight`'s own, with the values changed; the other parts as they were.
    """
    free = adjustable(weight)
    if free.factors is None or isinstance(hessian, Alike):
        found, before = _least_squares(free, target, hessian)
    else:
        found, before = _best_scales(free, target, hessian)
    try:
        stored = adjustable(free.rebuilt(found))  # judged as fp16 holds them
    except UnsupportedError:
        return weight
    better = _squares(hessian.root(target - stored.dense(stored.values)), free) < before
    kept = tuple(
        torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
        for new, old in zip(found, free.values, strict=True)
    )
    return free.rebuilt(kept)


def _best_scales(
    free: Adjustable, target: torch.Tensor, hessian: Hessian
) -> tuple[Values, torch.Tensor]:
    """Return the scales with the least error in the products, and the parts' errors before."""
    assert free.factors is not None
    (scales,) = free.values
    away = hessian.root(target - free.dense(free.values))
    pulls = (hessian.back(away).view_as(free.factors) * free.factors).sum(2)
    found = scales.clone()
    for start in range(0, len(scales), _ROWS):
        rows = slice(start, start + _ROWS)
        grams = _grams(free.factors[rows], hessian.matrix)
        diagonals = grams.diagonal(dim1=1, dim2=2)
        diagonals += _RIDGE * diagonals.mean(1, keepdim=True) + _TINY
        lower, failed = torch.linalg.cholesky_ex(grams)
        change = torch.cholesky_solve(pulls[rows].unsqueeze(2), lower).squeeze(2)
        found[rows] += torch.where((failed == 0).unsqueeze(1), change, 0.0)
    return (found,), _squares(away, free)


def _grams(factors: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return for each row the products between its groups, a lower triangle `[groups, groups]`."""
    rows, groups, size = factors.shape
    grams = factors.new_zeros(rows, groups, groups)
    for group in range(groups):
        start = group * size
        moved = factors[:, group] @ hessian[start : start + size, start:]
        products = moved.view(rows, -1, size).mul_(factors[:, group:])
        grams[:, group:, group] = products.sum(2)
    return grams


def _least_squares(
    free: Adjustable, target: torch.Tensor, hessian: Hessian | Alike
) -> tuple[Values, torch.Tensor]:
    """Return values with about the least error in the products, and the parts' errors before."""
    at_zero = free.dense(tuple(torch.zeros_like(value) for value in free.values))
    dense, pull, *_ = vjp(free.dense, free.values)

    def image(values: Values) -> torch.Tensor:
        return free.dense(values) - at_zero

    inverse = tuple(1 / size for size in _curvatures(free, image, pull, hessian.diagonal()))
    away = hessian.root(target - dense)
    before = _squares(away, free)
    residual: Values = pull(hessian.back(away))[0]
    direction = _product(residual, inverse)
    norm = _dot(residual, direction)
    found = free.values
    for _ in range(_STEPS):
        moved = hessian.root(image(direction))
        length = norm / _squares(moved, free).clamp(min=_TINY)
        found = _plus(found, length, direction)
        if float((length * norm).sum()) < _ENOUGH * float(before.sum()):
            break
        residual = _plus(residual, -length, pull(hessian.back(moved))[0])
        scaled = _product(residual, inverse)
        previous, norm = norm, _dot(residual, scaled)
        direction = _plus(scaled, norm / previous.clamp(min=_TINY), direction)
    return found, before


def _squares(outputs: torch.Tensor, free: Adjustable) -> torch.Tensor:
    """Return the sum of squares of each part, `[parts]`."""
    return outputs.square().view(len(free.values[0]), -1).sum(1)


def _curvatures(
    free: Adjustable,
    image: Callable[[Values], torch.Tensor],
    pull: Callable[[torch.Tensor], tuple[Values]],
    diagonal: torch.Tensor,
) -> Values:
    """Return how steep the error is along each value alone (Jacobi's preconditioner)."""
    found = []
    for at in range(len(free.values)):
        along = tuple(
            torch.full_like(value, float(index == at)) for index, value in enumerate(free.values)
        )
        found.append(pull(image(along) * diagonal)[0][at].clamp(min=_TINY))
    return tuple(found)


def _product(values: Values, others: Values) -> Values:
    return tuple(value * other for value, other in zip(values, others, strict=True))


def _plus(values: Values, length: torch.Tensor, others: Values) -> Values:
    """Return `values` and, part by part, `length` `[parts]` times `others`."""
    return tuple(
        value + length.view(-1, *[1] * (value.dim() - 1)) * other
        for value, other in zip(values, others, strict=True)
    )


def _dot(values: Values, others: Values) -> torch.Tensor:
    """Return the product of each part, `[parts]`."""
    return torch.stack([value.flatten(1).sum(1) for value in _product(values, others)]).sum(0)
