"""Matrix products and convolution, accumulated in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Tensor, floats, op, same


@op("linear", floats("x", "weight", "bias"), fresh=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., in] @ weight [out, in].T + bias [out]."""
    return F.linear(x, weight, bias)


@op("matmul", same("x", "y"), fresh=True)
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Return the batched product of x and y, each transposed in its last two axes on demand."""
    if transpose_x:
        x = x.transpose(-1, -2)
    if transpose_y:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


@op("einsum", floats("values"), fresh=True)
def einsum(values: Sequence[Tensor], equation: str) -> Tensor:
    """Return the contraction of two tensors; axes of size 1 broadcast."""
    return torch.einsum(equation, *values)


@op("conv", floats("x", "weight", "bias"), fresh=True)
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
    amounts = _padding(x, weight, pad_type, pad, steps, holes)
    if any(amounts):
        flipped = [amounts[2 * axis + end] for axis in reversed(range(spatial)) for end in (0, 1)]
        x = F.pad(x, flipped)
    if spatial == 1:
        return F.conv1d(x, weight, bias, steps, 0, holes, groups)
    if spatial == 2:
        return F.conv2d(x, weight, bias, steps, 0, holes, groups)
    return F.conv3d(x, weight, bias, steps, 0, holes, groups)


def _padding(
    x: Tensor,
    weight: Tensor,
    pad_type: str,
    pad: list[int] | None,
    strides: list[int],
    dilations: list[int],
) -> list[int]:
    """Return (before, after) of each spatial axis, flat."""
    spatial = x.dim() - 2
    if pad_type == "valid":
        return [0] * 2 * spatial
    if pad_type == "custom":
        return pad or [0] * 2 * spatial
    if pad_type not in ("same", "same_lower"):
        raise ArtifactError(f"has the unknown pad_type '{pad_type}'")
    amounts = []
    for axis in range(spatial):
        size, step = x.shape[2 + axis], strides[axis]
        kernel = (weight.shape[2 + axis] - 1) * dilations[axis] + 1
        total = max(0, step * -(-size // step) - size + kernel - step)
        small, large = total // 2, total - total // 2
        amounts += [small, large] if pad_type == "same" else [large, small]
    return amounts
