"""The numbers of a quantized matrix that may still change once its codes are fixed.

    free = adjustable(weight)
    free.dense(free.values)               # what the weight stands for, fp32 [rows, columns]
    free.rebuilt(changed)                 # the same codes with other scales or tables

`dense` is linear in scales, in float zero points times their scales, and in the entries of tables,
and torch differentiates it: `refit` solves for those numbers, `tune` follows their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torchao.prototype.quantization.codebook_coreml import CodebookQuantizedTensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.lookup import LookupTensor, look_up
from llm_coreml.quantize.formats.tensors import codebook_tensor, integer_tensor, lookup_tensor

# Up to here fp16 tells integers apart.
_LARGEST_ZERO_POINT = 2048
Values = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Adjustable:
    """A quantized matrix with its codes fixed.

    Attributes:
        values: What may change, fp32; the first axis of each counts parts of the matrix, groups of
            consecutive rows, that have nothing to do with each other.
        dense: Values -> fp32 `[rows, columns]`, linear and differentiable.
        rebuilt: Values -> the quantized matrix, for which they become fp16 numbers.
        factors: What each scale is multiplied by, fp32 `[rows, groups, group_size]`, where nothing
            but scales of groups within a row may change; else None.
    """

    values: Values
    dense: Callable[[Values], torch.Tensor]
    rebuilt: Callable[[Values], torch.Tensor]
    factors: torch.Tensor | None = None


@singledispatch
def adjustable(weight: torch.Tensor) -> Adjustable:
    """Return what may change of `weight` `[rows, columns]`.

    Raises:
        UnsupportedError: it is not quantized.
    """
    raise UnsupportedError("A weight without codes has no scales and no tables to adjust.")


@adjustable.register
def _(weight: IntxUnpackedToInt8Tensor) -> Adjustable:
    scale, zero_point, codes = weight.scale.clone(), weight.zero_point, weight.qdata
    bits = int(str(weight.target_dtype).rpartition("int")[2])
    grouped = codes.to(torch.float32).view(*scale.shape, -1)
    if zero_point.is_floating_point():
        return Adjustable(
            (scale, scale * zero_point),
            lambda v: (v[0].unsqueeze(2) * grouped - v[1].unsqueeze(2)).view(codes.shape),
            lambda v: _with_zero_points(codes, v[0], v[1], bits),
        )
    offset = None if not bool(zero_point.any()) else zero_point
    grouped = grouped - zero_point.to(torch.float32).unsqueeze(2)
    return Adjustable(
        (scale,),
        lambda v: (v[0].unsqueeze(2) * grouped).view(codes.shape),
        lambda v: integer_tensor(codes, v[0], offset, bits),
        grouped,
    )


def _with_zero_points(
    codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return `scale * codes - shift`, with scales that leave zero points where fp16 is exact."""
    least = (shift.abs() / _LARGEST_ZERO_POINT).clamp(
        min=torch.finfo(torch.float16).smallest_normal
    )
    scale = torch.where(scale.abs() < least, torch.copysign(least, scale), scale)
    return integer_tensor(codes, scale, shift / scale, bits)


@adjustable.register
def _(weight: CodebookQuantizedTensor) -> Adjustable:
    tables, codes = weight.codebook, weight.codes
    bits = int(str(weight.code_dtype).rpartition("uint")[2])
    rows = codes.shape[0]
    return Adjustable(
        (tables.clone(),),
        lambda v: look_up(codes, v[0], 0, rows),
        lambda v: codebook_tensor(codes, v[0].squeeze(3), bits),
    )


@adjustable.register
def _(weight: LookupTensor) -> Adjustable:
    codes, tables, bits = weight.codes, weight.tables, weight.bits
    scale, zero_point = weight.scale, weight.zero_point
    rows = weight.shape[0]

    def scaled(values: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        if factors is None:
            return values
        grouped = values.view(
            factors.shape[0], -1, factors.shape[1], values.shape[1] // factors.shape[1]
        )
        if zero_point is not None:
            grouped = grouped - zero_point[:, None, :, None]
        return (grouped * factors[:, None, :, None]).view(values.shape)

    if tables.is_floating_point():
        return Adjustable(
            (tables.clone(),),
            lambda v: scaled(look_up(codes, v[0], 0, rows), scale),
            lambda v: lookup_tensor(codes, v[0], bits, scale, zero_point),
        )
    assert scale is not None
    numbers = look_up(codes, tables, 0, rows).to(torch.float32)
    return Adjustable(
        (scale.clone(),),
        lambda v: scaled(numbers, v[0]),
        lambda v: lookup_tensor(codes, tables, bits, v[0], zero_point),
    )
