"""Reading by index: the gather family. Negative indices count from the end; others are checked."""

from __future__ import annotations

import math

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Tensor, fixed, op, same


def wrapped(indices: Tensor, size: int) -> Tensor:
    """Return indices as int64 in [0, size).

    Raises:
        ArtifactError: an index is outside of [-size, size).
    """
    result = indices.to(torch.int64)
    if not result.numel():
        return result
    low, high = torch.aminmax(result)
    if low.item() < -size or high.item() >= size:
        raise ArtifactError(
            f"reads or writes index {int(low) if low.item() < -size else int(high)} of {size}"
        )
    return torch.where(result < 0, result + size, result) if low.item() < 0 else result


@op("gather", same("x"), exact=True, fresh=True)
def gather(
    x: Tensor,
    indices: Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    """Return the entries of x along axis at indices.

    Args:
        x: [*batch, *before, size, *after].
        indices: [*batch, *chosen], integers.
        axis: the axis of x to read along.
        batch_dims: how many leading axes x and indices share.
        validate_indices: accepted; the reference always validates.

    Returns:
        [*batch, *before, *chosen, *after].
    """
    axis = axis % x.dim()
    places = wrapped(indices, x.shape[axis])
    if batch_dims == 0:
        flat = x.index_select(axis, places.reshape(-1))
        return flat.reshape((*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]))
    _check_batch(x, places, batch_dims)
    count = math.prod(places.shape[batch_dims:])
    before, after = [1] * (axis - batch_dims), [1] * (x.dim() - axis - 1)
    index = places.reshape(*places.shape[:batch_dims], *before, count, *after)
    flat = x.gather(axis, index.expand(*x.shape[:axis], count, *x.shape[axis + 1 :]))
    return flat.reshape(*x.shape[:axis], *places.shape[batch_dims:], *x.shape[axis + 1 :])


def _check_batch(x: Tensor, indices: Tensor, batch_dims: int) -> None:
    if x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise ArtifactError(
            f"has {batch_dims} batch axes, which differ in {list(x.shape)} and "
            f"{list(indices.shape)}"
        )


@op("gather_along_axis", same("x"), exact=True, fresh=True)
def gather_along_axis(
    x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    """Return, for each place of indices, the entry of x whose coordinate along axis it names."""
    return x.gather(axis, wrapped(indices, x.shape[axis]))


@op("gather_nd", same("x"), exact=True)
def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    """Return the parts of x whose leading coordinates are the rows of indices.

    Args:
        x: [*batch, *D].
        indices: [*batch, *chosen, K]; a row holds K coordinates into D.
        batch_dims: how many leading axes x and indices share.
        validate_indices: accepted; the reference always validates.

    Returns:
        [*batch, *chosen, *D[K:]].
    """
    _check_batch(x, indices, batch_dims)
    depth = indices.shape[-1]
    coordinates = [wrapped(indices[..., at], x.shape[batch_dims + at]) for at in range(depth)]
    for axis in range(batch_dims):
        # The place within the batch is one more coordinate, the same along all other axes.
        sizes = [1] * (indices.dim() - 1)
        sizes[axis] = -1
        places = torch.arange(x.shape[axis], device=x.device)
        coordinates.insert(axis, places.reshape(sizes))
    return x[tuple(coordinates)]


@op("non_zero", fixed("int32"), exact=True, fresh=True)
def non_zero(x: Tensor) -> Tensor:
    """Return the places of the elements that are not 0, in order, as int32 [N, rank]."""
    return torch.nonzero(x).to(torch.int32)


@op("reverse_sequence", same("x"), exact=True, fresh=True)
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Return x with the first lengths[i] elements along seq_axis in reverse order.

    Args:
        x: any rank.
        lengths: integers [x.shape[batch_axis]], each from 0 to x.shape[seq_axis].
        seq_axis: the axis that is reversed.
        batch_axis: the axis along which i runs.

    Raises:
        ArtifactError: a length is out of range, or their number is not the batch's.
    """
    seq_axis, batch_axis = seq_axis % x.dim(), batch_axis % x.dim()
    size = x.shape[seq_axis]
    if lengths.shape != (x.shape[batch_axis],) or seq_axis == batch_axis:
        raise ArtifactError(
            f"has lengths {list(lengths.shape)} for axis {batch_axis} of {list(x.shape)}"
        )
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= size:
        raise ArtifactError(f"reverses up to {int(lengths.max())} elements of {size}")
    place = torch.arange(size, device=x.device)
    length = lengths.to(torch.int64).unsqueeze(1)
    places = torch.where(place < length, length - 1 - place, place)
    if seq_axis < batch_axis:
        places = places.T
    sizes = [n if axis in (seq_axis, batch_axis) else 1 for axis, n in enumerate(x.shape)]
    return x.gather(seq_axis, places.reshape(sizes).expand(x.shape))
