"""Weights from codes, scales and tables: the tensors that the lowering takes, one way to make each.

    weight = integer_tensor(codes, scale, None, bits=4)           # scale * codes
    weight = codebook_tensor(codes, tables, bits=3)               # tables[block, codes]
    weight = lookup_tensor(codes, tables, 3, scale, None)         # scale * tables[block, codes]

Quantizers, calibration and imports of quantized checkpoints all end here. Scales, float zero points
and tables become fp16 numbers, which is what Core ML stores.
"""

from __future__ import annotations

import torch
from torchao.prototype.quantization.codebook_coreml import CodebookQuantizedTensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.lookup import LookupTensor

# The values of MXFP4 (E2M1) times two, by code: a sign, two bits of exponent, one of mantissa.
# OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.
MXFP4_ENTRIES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def integer_tensor(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Return the matrix `scale * (codes - zero_point)`.

    Args:
        codes: int8 `[rows, columns]`, from `-2**(bits - 1)` to `2**(bits - 1) - 1`.
        scale: Any float type `[rows, groups]`; consecutive columns share one.
        zero_point: `[rows, groups]`: int8 from the codes' range, or any float type; None is zero.
        bits: 4 or 8, or 2, 3 or 6, for which Core ML has no integers: those are looked up in a
            table of them.

    Raises:
        UnsupportedError: a zero point is out of range, or fp16 cannot hold a scale.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = _halves(scale, "scale")
    if zero_point is not None and zero_point.is_floating_point():
        zero_point = _halves(zero_point, "zero point")
    elif (
        zero_point is not None and not low <= int(zero_point.min()) <= int(zero_point.max()) <= high
    ):
        raise UnsupportedError(
            f"a zero point is {_furthest(zero_point):g}; those of int{bits} are integers from "
            f"{low} to {high}, so use --zero-point float."
        )
    if bits not in (4, 8):
        table = torch.arange(low, high + 1, dtype=torch.int8).view(1, 1, -1)
        places = codes.to(torch.uint8) - (low % 256)
        return lookup_tensor(places, table, bits, scale, zero_point)
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=torch.int8)
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


def mxfp4_tensor(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return the matrix `2**exponents * value`, the values being those of 4-bit floats (E2M1).

    Args:
        codes: uint8 `[rows, columns]`, below 16: places in `MXFP4_ENTRIES`.
        exponents: Integers `[rows, columns / 32]`, without the bias of 127.

    Raises:
        UnsupportedError: fp16 cannot hold a scale, half of which is `2**exponents`.
    """
    scale = torch.ldexp(torch.full(exponents.shape, 0.5), exponents)
    if bool((exponents < -23).any()):
        raise UnsupportedError(
            f"a block's exponent is {int(exponents.min())}; Core ML keeps scales as fp16, which "
            "ends at 2^-24. Use another scheme, or scale the weights."
        )
    table = torch.tensor(MXFP4_ENTRIES, dtype=torch.int8).view(1, 1, -1)
    return lookup_tensor(codes, table, 4, scale, None)


def codebook_tensor(codes: torch.Tensor, tables: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the matrix whose elements `codes` name in `tables`.

    Args:
        codes: uint8 `[rows, columns]`, below `2**bits`.
        tables: Any float type `[row_groups, column_groups, 2**bits]`; a block of consecutive rows
            and columns shares a table.
        bits: 1, 2, 3, 4, 6 or 8.

    Raises:
        UnsupportedError: fp16 cannot hold an entry.
    """
    row_groups, column_groups, _ = tables.shape
    if row_groups > 1 and column_groups > 1:
        return lookup_tensor(codes, tables, bits, None, None)
    found: torch.Tensor = CodebookQuantizedTensor(
        codes.contiguous(),
        _halves(tables, "value").unsqueeze(3),
        getattr(torch, f"uint{bits}"),
        [codes.shape[0] // row_groups, codes.shape[1] // column_groups],
        codes.shape,
        dtype=torch.float32,
    )
    return found


def lookup_tensor(
    codes: torch.Tensor,
    tables: torch.Tensor,
    bits: int,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> torch.Tensor:
    """Return the matrix `scale * (tables[block, codes] - zero_point)`.

    Args:
        codes: uint8 `[rows / width, columns]`, below `2**bits`.
        tables: int8 or any float type, `[row_groups, column_groups, 2**bits]` or, with entries
            that lie along `width` consecutive rows, `[..., 2**bits, width]`.
        bits: 1, 2, 3, 4, 6 or 8.
        scale: Any float type `[row_blocks, column_blocks]`; None is one.
        zero_point: As `scale`, or int8 if the tables are; None is zero.

    Raises:
        UnsupportedError: fp16 cannot hold a scale, a zero point or an entry.
    """
    if tables.dim() == 3:
        tables = tables.unsqueeze(3)
    if tables.is_floating_point():
        tables = _halves(tables, "value")
    if zero_point is not None and zero_point.is_floating_point():
        zero_point = _halves(zero_point, "zero point")
    scale = None if scale is None else _halves(scale, "scale")
    return LookupTensor(codes.contiguous(), tables.contiguous(), bits, scale, zero_point)


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
