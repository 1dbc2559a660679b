"""Weights from codes, scales and tables: the tensors that the lowering takes, one way to make each.

    weight = integer_tensor(codes, scale, None, bits=4)           # scale * codes
    weight = codebook_tensor(codes, tables, bits=3)               # tables[group, codes]

Quantizers, calibration and imports of quantized checkpoints all end here. Scales, float zero points
and tables become fp16 numbers, which is what Core ML stores.
"""

from __future__ import annotations

import torch
from torchao.prototype.quantization.codebook_coreml import CodebookQuantizedTensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from llm_coreml.errors import UnsupportedError


def integer_tensor(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Return the matrix `scale * (codes - zero_point)`.

    Args:
        codes: int8 `[rows, columns]`, from `-2**(bits - 1)` to `2**(bits - 1) - 1`.
        scale: Any float type `[rows, groups]`; consecutive columns share one.
        zero_point: `[rows, groups]`: int8 from the codes' range, or any float type; None is zero.
        bits: 4 or 8.

    Raises:
        UnsupportedError: a zero point is out of range, or fp16 cannot hold a scale.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = _halves(scale, "scale")
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=torch.int8)
    elif zero_point.is_floating_point():
        zero_point = _halves(zero_point, "zero point")
    elif int(zero_point.min()) < low or int(zero_point.max()) > high:
        raise UnsupportedError(
            f"a zero point is {_furthest(zero_point):g}; those of int{bits} are integers from "
            f"{low} to {high}, so use --zero-point float."
        )
    found: torch.Tensor = IntxUnpackedToInt8Tensor(
        codes.contiguous(),
        scale,
        zero_point.contiguous(),
        getattr(torch, f"int{bits}"),
        (1, codes.shape[1] // scale.shape[1]),
        torch.float32,
        None,
    )
    return found


def codebook_tensor(codes: torch.Tensor, tables: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the matrix whose elements `codes` name in `tables`.

    Args:
        codes: uint8 `[rows, columns]`, below `2**bits`.
        tables: Any float type `[row_groups, column_groups, 2**bits]`, one of the groups being 1;
            consecutive rows, or columns, share a table.
        bits: 1, 2, 3, 4, 6 or 8.

    Raises:
        UnsupportedError: fp16 cannot hold an entry.
    """
    row_groups, column_groups, _ = tables.shape
    found: torch.Tensor = CodebookQuantizedTensor(
        codes.contiguous(),
        _halves(tables, "value").unsqueeze(3),
        getattr(torch, f"uint{bits}"),
        [codes.shape[0] // row_groups, codes.shape[1] // column_groups],
        codes.shape,
        dtype=torch.float32,
    )
    return found


def _halves(values: torch.Tensor, what: str) -> torch.Tensor:
    """Return `values` as fp32, rounded to fp16."""
    halves = values.to(torch.float16)
    if not bool(torch.isfinite(halves).all()):
        raise UnsupportedError(
            f"a {what} is {_furthest(values):g}; Core ML keeps scales and tables as fp16, which "
            "ends at 65504. Use another scheme, or scale the weights."
        )
    return halves.to(torch.float32).contiguous()


def _furthest(values: torch.Tensor) -> float:
    return float(values.flatten()[values.abs().argmax()])
