"""Choose a matrix's codes so that its products keep their values, not its weights theirs.

    codes = gptq(weight, hessian, grid)

Quantizing the inputs' columns one after the other, each is rounded to the grid and the error that
this makes in the output is made up for, as far as it can be, by changing the columns that are still
to come. With `H = X^T X` of the inputs X, the best change follows from the Cholesky factor of the
inverse of H (Frantar et al., "GPTQ", arXiv:2210.17323; the idea is LeCun's Optimal Brain Surgeon).
"""

from __future__ import annotations

import torch

from llm_coreml.errors import CheckpointError
from llm_coreml.quantize.grids import Grid

# A text of some thousand tokens does not tell more than that: with less, codes fit its noise.
DAMPING = 0.05
# Columns whose changes to all later ones are applied in one product.
_BLOCK = 128
_TRIES = 8


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Return `hessian` `[n, n]` with a share of its mean diagonal added to the diagonal.

    A column that no input ever reached has nothing to say: it is given the mean, and stays alone.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    added = torch.where(diagonal == 0, mean, damping * mean)
    return hessian + torch.diag(added)


def gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the codes of `weight` on `grid` whose product with the inputs is close to its own.

    Args:
        weight: `[rows, columns]`, fp32 or fp64, in which the sums are formed.
        hessian: fp64 `[columns, columns]`: mean outer product of the inputs with themselves.
        grid: Scales or tables of the matrix.

    Returns:
        Codes `[rows, columns]`.

    Raises:
        CheckpointError: no damping makes the Hessian one that can be factored.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order]).to(weight.dtype)
    columns: list[int] = order.tolist()
    left = weight.T[order].contiguous()  # a column is a row here, and lies in one piece
    codes = torch.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for at in range(start, stop):
            codes[at] = grid.nearest(columns[at], left[at])
            error = (left[at] - grid.values(columns[at], codes[at])) / factor[at, at]
            left[at + 1 : stop].addr_(factor[at, at + 1 : stop], error, alpha=-1)
            errors[at - start] = error
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of `hessian`, damped until there is one."""
    damping = DAMPING
    for _ in range(_TRIES):
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                found: torch.Tensor = factor
                return found
        damping *= 10
    raise CheckpointError(
        "the inputs that it gets cannot be told apart by numbers of any precision; give another "
        "text with --calibrate."
    )
