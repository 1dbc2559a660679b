"""Choose a matrix's codes so that its products keep their values, not its weights theirs.

    codes = gptq(weight, hessian, grid)

Quantizing the inputs' columns one after the other, each is rounded to the grid and the error that
this makes in the output is made up for, as far as it can be, by changing the columns that are still
to come (Frantar et al., "GPTQ", arXiv:2210.17323; the idea is LeCun's Optimal Brain Surgeon). With
`H = L L^T` the error of the outputs is that of `(weight - stored) L`, whose last column depends on
the last column of weights alone, the one before on two, and so on: going backward, each column has
one best value, and no inverse is needed (Babai's nearest plane).
"""

from __future__ import annotations

import torch

from llm_coreml.quantize.calibrate.hessian import Hessian
from llm_coreml.quantize.formats.grids import Grid

# Columns that are told in one product of the errors of all columns before.
_BLOCK = 128


def gptq(weight: torch.Tensor, hessian: Hessian, grid: Grid) -> torch.Tensor:
    """Return the codes of `weight` on `grid` whose product with the inputs is close to its own.

    Args:
        weight: `[rows, columns]`, fp32 or fp64.
        hessian: Of the columns, in the type of `weight`, in which the sums are formed.
        grid: Scales or tables of the matrix.

    Returns:
        Codes `[rows, columns]`.
    """
    columns: list[int] = hessian.order.tolist()
    wanted = weight.T[hessian.order]  # a column is a row here, and lies in one piece
    errors, codes = torch.empty_like(wanted), torch.empty_like(wanted)
    for stop in range(len(wanted), 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        block = slice(start, stop)
        shares = hessian.lower[:, block] / hessian.lower.diagonal()[block]
        moved = wanted[block] + shares[stop:].T @ errors[stop:]
        for at in reversed(range(start, stop)):
            value = moved[at - start] + shares[at + 1 : stop, at - start] @ errors[at + 1 : stop]
            codes[at] = grid.nearest(columns[at], value)
            errors[at] = wanted[at] - grid.values(columns[at], codes[at])
    result = torch.empty_like(codes)
    result[hessian.order] = codes
    return result.T
