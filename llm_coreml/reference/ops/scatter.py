"""Writing by index: the scatter family, all of it through one flat combination."""

from __future__ import annotations

import math

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.indexing import wrapped
from llm_coreml.reference.ops.registry import Tensor, op, same


def _combine(data: Tensor, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Return data with updates combined into its flat places.

    Raises:
        ArtifactError: the mode is unknown, or two plain updates compete for one place.
    """
    if places.shape != updates.shape:
        raise ArtifactError(
            f"has updates of shape {list(updates.shape)} where {list(places.shape)} is needed"
        )
    flat = data.reshape(-1).clone()
    places, values = places.reshape(-1), updates.reshape(-1)
    if mode == "update":
        if places.numel() and int(places.bincount().max()) > 1:
            raise ArtifactError("updates one element twice, and no rule says which update wins")
        flat[places] = values
    elif mode in ("add", "sub"):
        flat.index_add_(0, places, values if mode == "add" else -values)
    elif mode in ("mul", "div"):
        product = torch.ones_like(flat).scatter_reduce_(0, places, values, "prod")
        if mode == "div" and not data.is_floating_point():
            raise ArtifactError("divides integers, which Core ML does not define")
        flat = flat * product if mode == "mul" else flat / product
    elif mode in ("min", "max"):
        flat.scatter_reduce_(0, places, values, "amin" if mode == "min" else "amax")
    else:
        raise ArtifactError(f"has the unknown mode '{mode}'")
    return flat.reshape(data.shape)


def _numbers(data: Tensor) -> Tensor:
    return torch.arange(data.numel(), device=data.device).reshape(data.shape)


@op("scatter", same("data", "updates"), fresh=True)
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Return data with updates combined into its entries along axis at indices.

    Args:
        data: [*before, size, *after].
        indices: [*chosen].
        updates: [*before, *chosen, *after].
        axis: the axis of data to write along.
        mode: add, sub, mul, div, min, max or update.
        validate_indices: accepted; the reference always validates.
    """
    axis = axis % data.dim()
    chosen = wrapped(indices, data.shape[axis])
    places = _numbers(data).index_select(axis, chosen.reshape(-1))
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    return _combine(data, places.reshape(shape), updates, mode)


@op("scatter_along_axis", same("data", "updates"), fresh=True)
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Return data with updates combined where each index names the coordinate along axis."""
    places = _numbers(data).gather(axis, wrapped(indices, data.shape[axis]))
    return _combine(data, places, updates, mode)


@op("scatter_nd", same("data", "updates"), fresh=True)
def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Return data [*D] with updates combined at the leading coordinates in indices [*chosen, K]."""
    depth = indices.shape[-1]
    inner = math.prod(data.shape[depth:])
    row = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for at in range(depth):
        row = row * data.shape[at] + wrapped(indices[..., at], data.shape[at])
    places = row.unsqueeze(-1) * inner + torch.arange(inner, device=row.device)
    return _combine(data, places.reshape(*row.shape, *data.shape[depth:]), updates, mode)
