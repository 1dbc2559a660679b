"""Moves between the spatial axes and the channels or the batch; cuts and windows."""

from __future__ import annotations

from torch.nn import functional as F

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Tensor, op, same


@op("pixel_shuffle", same("x"), exact=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """Return x [N, C f f, H, W] as [N, C, H f, W f]; a channel's f f parts lie side by side."""
    return F.pixel_shuffle(x, upscale_factor)


@op("pixel_unshuffle", same("x"), exact=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """Return x [N, C, H f, W f] as [N, C f f, H, W]."""
    return F.pixel_unshuffle(x, downscale_factor)


@op("depth_to_space", same("x"), exact=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Return x [N, b b C, H, W] as [N, C, H b, W b]; a block's parts are C channels apart."""
    n, c, h, w = x.shape
    b = block_size
    parts = x.reshape(n, b, b, c // (b * b), h, w)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@op("space_to_depth", same("x"), exact=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """Return x [N, C, H b, W b] as [N, b b C, H, W]."""
    n, c, h, w = x.shape
    b = block_size
    parts = x.reshape(n, c, h // b, b, w // b, b)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, b * b * c, h // b, w // b)


@op("space_to_batch", same("x"), exact=True)
def space_to_batch(x: Tensor, block_shape: list[int], paddings: list[list[int]]) -> Tensor:
    """Return x [N, C, H a, W b] as [a b N, C, H, W], after padding H a and W b with zeros."""
    x = F.pad(x, [*paddings[1], *paddings[0]])
    n, c, h, w = x.shape
    a, b = block_shape
    parts = x.reshape(n, c, h // a, a, w // b, b)
    return parts.permute(3, 5, 0, 1, 2, 4).reshape(a * b * n, c, h // a, w // b)


@op("batch_to_space", same("x"), exact=True)
def batch_to_space(x: Tensor, block_shape: list[int], crops: list[list[int]]) -> Tensor:
    """Return x [a b N, C, H, W] as [N, C, H a, W b], and cut the borders off."""
    n, c, h, w = x.shape
    a, b = block_shape
    parts = x.reshape(a, b, n // (a * b), c, h, w)
    whole = parts.permute(2, 3, 4, 0, 5, 1).reshape(n // (a * b), c, h * a, w * b)
    return crop(whole, *crops)


@op("crop", same("x"), exact=True)
def crop(x: Tensor, crop_height: list[int], crop_width: list[int]) -> Tensor:
    """Return x [*D, H, W] without (first, last) rows and columns."""
    for axis, (first, last) in ((-2, crop_height), (-1, crop_width)):
        size = x.shape[axis]
        if min(first, last) < 0 or first + last > size:
            raise ArtifactError(f"cuts {first} and {last} off an axis of {size}")
        x = x.narrow(axis, first, size - first - last)
    return x


@op("sliding_windows", same("x"), exact=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """Return the windows of x [*before, D, *after] along axis as [*before, W, size, *after]."""
    axis = axis % x.dim()
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)
