"""Slices read and written: MIL's begin, end, stride and their masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Ints, Tensor, integers, op, same


def _view(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Sequence[int] | None,
    begin_mask: Sequence[bool] | None,
    end_mask: Sequence[bool] | None,
    squeeze_mask: Sequence[bool] | None,
) -> tuple[Tensor, list[int]]:
    """Return the chosen part of x as a view, and the axes of that view that run backwards."""
    rank = x.dim()
    starts, stops = integers(begin), integers(end)
    if len(starts) != rank or len(stops) != rank:
        raise ArtifactError(f"gives {len(starts)} begins and {len(stops)} ends for rank {rank}")
    index: list[slice | int] = []
    flipped: list[int] = []
    kept = 0
    for axis in range(rank):
        start = None if begin_mask and begin_mask[axis] else starts[axis]
        if squeeze_mask and squeeze_mask[axis]:
            index.append(start or 0)
            continue
        stop = None if end_mask and end_mask[axis] else stops[axis]
        step = stride[axis] if stride else 1
        if step < 0:
            # torch has no backward steps: the same elements forward, then reversed.
            chosen = range(*slice(start, stop, step).indices(x.shape[axis]))
            start, stop = (chosen[-1], chosen[0] + 1) if chosen else (0, 0)
            step = -step
            flipped.append(kept)
        index.append(slice(start, stop, step))
        kept += 1
    return x[tuple(index)], flipped


@op("slice_by_index", same("x"), exact=True)
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """Return x[begin:end:stride] per axis.

    A set begin_mask or end_mask drops that bound; a set squeeze_mask takes the element at begin
    and removes the axis.
    """
    part, flipped = _view(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return part.flip(flipped) if flipped else part


@op("slice_by_size", same("x"), exact=True)
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """Return the block of x that starts at begin; a size of -1 takes the rest of the axis."""
    for axis, (start, length) in enumerate(zip(integers(begin), integers(size), strict=True)):
        start = start + x.shape[axis] if start < 0 else start
        x = x.narrow(axis, start, x.shape[axis] - start if length == -1 else length)
    return x


@op("slice_update", same("x", "update"), exact=True, fresh=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """Return a copy of x whose slice holds update; bounds and masks as in slice_by_index."""
    return slice_update_in_place(
        x.clone(), update, begin, end, stride, begin_mask, end_mask, squeeze_mask
    )


def slice_update_in_place(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """Write update into the slice of x and return x; for a state that nothing else looks at.

    Raises:
        ArtifactError: update does not have the slice's shape; it is not broadcast.
    """
    part, flipped = _view(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if part.shape != update.shape:
        raise ArtifactError(f"writes {list(update.shape)} into a slice of shape {list(part.shape)}")
    part.copy_(update.flip(flipped) if flipped else update)
    return x


@op("split", same("x"), exact=True)
def split(
    x: Tensor,
    axis: int,
    num_splits: int | None = None,
    split_sizes: list[int] | None = None,
) -> tuple[Tensor, ...]:
    """Return consecutive parts of x along axis: num_splits equal ones, or of the given sizes."""
    if split_sizes is not None:
        return torch.split(x, split_sizes, axis)
    if not num_splits or x.shape[axis] % num_splits:
        raise ArtifactError(f"cannot split {x.shape[axis]} into {num_splits} equal parts")
    return torch.split(x, x.shape[axis] // num_splits, axis)
