"""Fit scales and tables to a matrix's products once its codes are chosen.

    weight = refit(weight, target, hessian)

With the codes fixed, the squared error of the products is a quadratic function of scales and table
entries. Conjugate gradients (Hestenes and Stiefel, 1952) find its least value, for all rows or
tables at once, with one product with the Hessian for each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import vjp

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.adjustable import Adjustable, Values, adjustable

_STEPS = 8
# Keeps parts without any error, or any input, from dividing by zero.
_TINY = 1e-30


def refit(weight: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return `weight` with the same codes and other scales or tables.

    Args:
        weight: Quantized, `[rows, columns]`.
        target: What it is to come close to, fp32 `[rows, columns]`.
        hessian: fp32 `[columns, columns]`: mean outer product of the inputs, positive definite.

    Returns:
        The parts of it whose products with the inputs are no further from those of `target` than
        `weight`'s own, with the values changed; the other parts as they were.
    """
    free = adjustable(weight)
    parts = len(free.values[0])
    before = _errors(free.dense(free.values), target, hessian, parts)
    found = _least_squares(free, target, hessian)
    try:
        stored = adjustable(free.rebuilt(found))  # judged as fp16 holds them
    except UnsupportedError:
        return weight
    better = _errors(stored.dense(stored.values), target, hessian, parts) < before
    kept = tuple(
        torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)
        for new, old in zip(found, free.values, strict=True)
    )
    return free.rebuilt(kept)


def _errors(
    dense: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor, parts: int
) -> torch.Tensor:
    away = dense - target
    return ((away @ hessian) * away).view(parts, -1).sum(1)


def _least_squares(free: Adjustable, target: torch.Tensor, hessian: torch.Tensor) -> Values:
    """Return the values near those of `free` with the least error in the products."""
    at_zero = free.dense(tuple(torch.zeros_like(value) for value in free.values))
    dense, pull, *_ = vjp(free.dense, free.values)

    def image(values: Values) -> torch.Tensor:
        return free.dense(values) - at_zero

    inverse = tuple(1 / size for size in _curvatures(free, image, pull, hessian.diagonal()))
    residual: Values = pull((target - dense) @ hessian)[0]
    direction = _product(residual, inverse)
    norm = _dot(residual, direction)
    found = free.values
    for _ in range(_STEPS):
        curved: Values = pull(image(direction) @ hessian)[0]
        length = norm / _dot(direction, curved).clamp(min=_TINY)
        found = _plus(found, length, direction)
        residual = _plus(residual, -length, curved)
        scaled = _product(residual, inverse)
        previous, norm = norm, _dot(residual, scaled)
        direction = _plus(scaled, norm / previous.clamp(min=_TINY), direction)
    return found


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
