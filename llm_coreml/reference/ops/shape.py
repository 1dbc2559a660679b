"""Shapes: reshaping, transposing, joining, repeating, padding, and tensors made from nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from llm_coreml.artifact.dtypes import DTYPES
from llm_coreml.artifact.limits import beyond
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import (
    Ints,
    Number,
    Tensor,
    fixed,
    integers,
    named_by,
    number,
    op,
    same,
)
from llm_coreml.reference.ops.storage import storage


def _check_size(elements: int) -> None:
    # What a computed size would allocate, nothing else bounds.
    if excess := beyond(4 * elements):
        raise ArtifactError(f"makes a tensor that {excess}")


def _value_type(dtypes: Any, constants: Any) -> str:
    # An omitted value is MIL's default 0.0, an fp32.
    return str(dtypes.get("value", "fp32"))


@op("reshape", same("x"), exact=True)
def reshape(x: Tensor, shape: Ints) -> Tensor:
    """Return x with another shape; 0 copies the size counted from the right, -1 is inferred."""
    sizes = integers(shape)
    if 0 in sizes and x.numel():
        offset = x.dim() - len(sizes)
        sizes = [
            (x.shape[axis + offset] if axis + offset >= 0 else 1) if size == 0 else size
            for axis, size in enumerate(sizes)
        ]
    return x.reshape(sizes)


@op("reshape_like", same("x"), exact=True)
def reshape_like(
    x: Tensor,
    ref_tensors: Sequence[Tensor],
    begins: Sequence[int],
    ends: Sequence[int],
    end_masks: Sequence[bool],
) -> Tensor:
    """Return x with a shape joined from parts of the reference tensors' shapes."""
    sizes: list[int] = []
    for reference, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += reference.shape[begin : None if masked else end]
    return x.reshape(sizes)


@op("expand_dims", same("x"), exact=True)
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    """Return x with axes of size 1 at the given places of the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("squeeze", same("x"), exact=True)
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Return x without the given axes, or without all, as far as their size is 1."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@op("transpose", same("x"), exact=True)
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    """Return x with its axes in the order perm."""
    return x.permute(perm)


@op("flatten2d", same("x"), exact=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """Return x with the axes before axis, and those from it on, joined."""
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("reverse", same("x"), exact=True, fresh=True)
def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Return x with the elements along axes, or along all, in reverse order."""
    return x.flip(list(range(x.dim())) if axes is None else axes)


@op("concat", same("values"), exact=True, fresh=True)
def concat(values: Sequence[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """Return the values joined along axis; interleaved, one element of each in turn."""
    if values[0].dim() == 0:
        return torch.stack(list(values))
    if interleave:
        axis = axis % values[0].dim()
        return torch.stack(list(values), axis + 1).flatten(axis, axis + 1)
    return torch.cat(list(values), axis)


@op("stack", same("values"), exact=True, fresh=True)
def stack(values: Sequence[Tensor], axis: int) -> Tensor:
    """Return the values joined along a new axis."""
    return torch.stack(list(values), axis)


@op("tile", same("x"), exact=True)
def tile(x: Tensor, reps: Ints) -> Tensor:
    """Return x repeated reps times along each axis."""
    counts = integers(reps)
    _check_size(x.numel() * math.prod(counts))
    return x.repeat(counts)


@op("pad", same("x"), exact=True)
def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Return x with (before, after) elements more on each of its last axes.

    Args:
        x: any rank.
        pad: flat pairs for the last `len(pad) / 2` axes, in the order of the axes.
        mode: constant, reflect (without the border) or replicate.
        constant_val: what a constant padding holds.
    """
    amounts = integers(pad)
    pairs = [(amounts[at], amounts[at + 1]) for at in range(0, len(amounts), 2)]
    if mode == "constant":
        flat = [amount for pair in reversed(pairs) for amount in pair]
        extra = [before + after for before, after in pairs]
        kept = x.dim() - len(pairs)
        sizes = [size + more for size, more in zip(x.shape[kept:], extra, strict=False)]
        _check_size(math.prod((*x.shape[:kept], *sizes)))
        return F.pad(x, flat, value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ArtifactError(f"has the unknown mode '{mode}'")
    for axis, (before, after) in enumerate(pairs, x.dim() - len(pairs)):
        size = x.shape[axis]
        index = torch.arange(-before, size + after, device=x.device)
        if mode == "replicate":
            index = index.clamp(0, size - 1)
        else:
            if max(before, after) >= size:
                raise ArtifactError(f"reflects {max(before, after)} elements of {size}")
            index = (size - 1) - (index.abs() - (size - 1)).abs()
        x = x.index_select(axis, index)
    return x


@op("shape", fixed("int32"), exact=True, fresh=True)
def shape(x: Tensor) -> Tensor:
    """Return the sizes of x as int32 [rank]."""
    return torch.tensor(x.shape, dtype=torch.int32, device=x.device)


@op("fill", _value_type, exact=True, fresh=True)
def fill(shape: Ints, declared: str, device: torch.device, value: Number = 0.0) -> Tensor:
    """Return a tensor of the given shape that holds value throughout."""
    sizes = integers(shape)
    _check_size(math.prod(sizes))
    return torch.full(sizes, number(value), dtype=storage(declared), device=device)


@op("fill_like", _value_type, exact=True, fresh=True)
def fill_like(ref_tensor: Tensor, declared: str, value: Number = 0.0) -> Tensor:
    """Return a tensor with the shape of ref_tensor that holds value throughout."""
    kind, device = storage(declared), ref_tensor.device
    return torch.full(ref_tensor.shape, number(value), dtype=kind, device=device)


@op("range_1d", same("start", "end", "step"), fresh=True)
def range_1d(
    start: Number, end: Number, step: Number, declared: str, device: torch.device
) -> Tensor:
    """Return start, start + step, ... below end."""
    first, last, stride = number(start), number(end), number(step)
    if stride:
        _check_size(int(abs((last - first) / stride)))
    return torch.arange(first, last, stride, dtype=storage(declared), device=device)


@op("one_hot", lambda dtypes, constants: dtypes.get("on_value", "int32"), exact=True, fresh=True)
def one_hot(
    indices: Tensor,
    one_hot_vector_size: Number,
    declared: str,
    axis: int = -1,
    on_value: float = 1,
    off_value: float = 0,
) -> Tensor:
    """Return on_value where the new axis equals indices, and off_value elsewhere."""
    depth = int(number(one_hot_vector_size))
    _check_size(indices.numel() * depth)
    place = axis % (indices.dim() + 1)
    sizes = [1] * (indices.dim() + 1)
    sizes[place] = depth
    classes = torch.arange(depth, dtype=torch.int32, device=indices.device).reshape(sizes)
    hit = indices.unsqueeze(place) == classes
    return torch.where(hit, on_value, off_value).to(storage(declared))


@op("band_part", same("x"), exact=True, fresh=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Return x with zeros beyond `lower` diagonals below and `upper` above; -1 keeps all."""
    rows = torch.arange(x.shape[-2], device=x.device).unsqueeze(1)
    columns = torch.arange(x.shape[-1], device=x.device)
    keep = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
    if lower >= 0:
        keep &= rows - columns <= lower
    if upper >= 0:
        keep &= columns - rows <= upper
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


@op("quantize", named_by("output_dtype"), exact=True, fresh=True, half=False)
def quantize(
    input: Tensor,  # noqa: A002 - MIL's name
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """Return round(input / scale) + zero_point, limited to output_dtype."""
    result = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        result = result + _along(zero_point, input, axis)
    row = DTYPES[output_dtype]
    low = -(1 << (row.bits - 1)) if row.signed else 0
    return result.clamp(low, low + (1 << row.bits) - 1).to(storage(output_dtype))


@op("dequantize", same("scale"), fresh=True)
def dequantize(
    input: Tensor,  # noqa: A002 - MIL's name
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """Return (input - zero_point) * scale."""
    values = input.to(torch.float32)
    if zero_point is not None:
        values = values - _along(zero_point, input, axis).to(torch.float32)
    return values * _along(scale, input, axis)


def _along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if parameter.dim() == 0:
        return parameter
    if axis is None:
        raise ArtifactError("has a vector of scales and no axis")
    return parameter.reshape([-1 if at == axis % x.dim() else 1 for at in range(x.dim())])
