"""Matrix products and convolution, accumulated in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Tensor, floats, op, same


# From iOS 17 on, constant weights may have another float type than x, whose type is the result's.
@op("linear", same("x"), fresh=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., in] @ weight [out, in].T + bias [out]; integers wrap."""
    return F.linear(x, weight, bias)


@op("matmul", same("x", "y"), fresh=True)
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Return the batched product of x and y, each transposed in its last two axes on demand."""
    if transpose_x:
        x = x.transpose(-1, -2)
    if transpose_y:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


@op("einsum", floats("values"))
def einsum(values: Sequence[Tensor], equation: str) -> Tensor:
    """Return the contraction of two tensors; axes of size 1 broadcast."""
    return torch.einsum(equation, *values)


@op("conv", floats("x"), fresh=True)
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Return the convolution of x [N, C, *D] with weight [out, C / groups, *K]."""
    spatial = x.dim() - 2
    steps = strides or [1] * spatial
    holes = dilations or [1] * spatial
    sizes = _reach(weight, holes)
    amounts = padding(x, sizes, pad_type, pad, steps)
    if any(amounts):
        flipped = [amounts[2 * axis + end] for axis in reversed(range(spatial)) for end in (0, 1)]
        x = F.pad(x, flipped)
    if spatial == 1:
        return F.conv1d(x, weight, bias, steps, 0, holes, groups)
    if spatial == 2:
        return F.conv2d(x, weight, bias, steps, 0, holes, groups)
    return F.conv3d(x, weight, bias, steps, 0, holes, groups)


def _reach(weight: Tensor, dilations: list[int]) -> list[int]:
    """Return how many elements the kernel spans along each spatial axis."""
    return [(size - 1) * hole + 1 for size, hole in zip(weight.shape[2:], dilations, strict=True)]


def padding(
    x: Tensor, sizes: list[int], pad_type: str, pad: list[int] | None, strides: list[int]
) -> list[int]:
    """Return (before, after) of each spatial axis of x [N, C, *D], flat.

    Args:
        x: what the windows move over.
        sizes: how many elements a window spans along each axis.
        pad_type: valid, custom, same (the larger half comes after) or same_lower.
        pad: the result for custom.
        strides: steps of the window.

    Raises:
        ArtifactError: the pad_type is unknown.
    """
    if pad_type == "valid":
        return [0] * 2 * len(sizes)
    if pad_type == "custom":
        return pad or [0] * 2 * len(sizes)
    if pad_type not in ("same", "same_lower"):
        raise ArtifactError(f"has the unknown pad_type '{pad_type}'")
    amounts = []
    for length, size, step in zip(x.shape[2:], sizes, strides, strict=True):
        total = max(0, step * -(-length // step) - length + size - step)
        small, large = total // 2, total - total // 2
        amounts += [small, large] if pad_type == "same" else [large, small]
    return amounts


@op("conv_transpose", floats("x"), fresh=True)
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Return the transposed convolution of x [N, C, *D] with weight [C, out / groups, *K].

    The whole result is cut by the padding. An output_shape may ask for more at the end, where no
    input reaches, by less than a stride.
    """
    spatial = x.dim() - 2
    steps = strides or [1] * spatial
    holes = dilations or [1] * spatial
    whole = _transposed(x, weight, steps, holes, groups)
    sizes = _transposed_sizes(x, _reach(weight, holes), pad_type, pad, steps)
    if output_shape is not None:
        if pad_type == "custom" and list(output_shape[2:]) != sizes:
            raise ArtifactError(f"asks for {output_shape[2:]}; its padding gives {sizes}")
        sizes = list(output_shape[2:])
    edges: list[int] = []
    for axis, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        length = whole.shape[2 + axis]
        before = (pad or [0] * 2 * spatial)[2 * axis] if pad_type == "custom" else 0
        if pad_type == "same":
            before = max(0, length - size) // 2
        if size < 1 or size + before - length >= step:
            raise ArtifactError(f"asks for {size} elements along an axis of {length}")
        edges = [-before, size + before - length, *edges]
    result = F.pad(whole, edges)
    return result if bias is None else result + bias.reshape([-1] + [1] * spatial)


def _transposed(
    x: Tensor, weight: Tensor, strides: list[int], dilations: list[int], groups: int
) -> Tensor:
    if x.dim() == 3:
        return F.conv_transpose1d(x, weight, None, strides, 0, 0, groups, dilations)
    if x.dim() == 4:
        return F.conv_transpose2d(x, weight, None, strides, 0, 0, groups, dilations)
    return F.conv_transpose3d(x, weight, None, strides, 0, 0, groups, dilations)


def _transposed_sizes(
    x: Tensor, reach: list[int], pad_type: str, pad: list[int] | None, strides: list[int]
) -> list[int]:
    """Return the spatial sizes that pad_type gives to a transposed convolution."""
    pairs = list(zip(x.shape[2:], strides, reach, strict=True))
    if pad_type == "same":
        return [length * step for length, step, _ in pairs]
    sizes = [(length - 1) * step + size for length, step, size in pairs]
    if pad_type == "custom" and pad is not None:
        return [size - pad[2 * at] - pad[2 * at + 1] for at, size in enumerate(sizes)]
    if pad_type not in ("valid", "custom"):
        raise ArtifactError(f"has the unknown pad_type '{pad_type}'")
    return sizes
