"""Pooling: the maximum, mean or Euclidean norm of every window of the spatial axes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.linear import padding
from llm_coreml.reference.ops.registry import Tensor, floats, op


def _windows(x: Tensor, sizes: list[int], strides: list[int]) -> Tensor:
    """Return the windows of x [N, C, *D] as [N, C, *positions, elements]."""
    for axis, (size, step) in enumerate(zip(sizes, strides, strict=True), 2):
        x = x.unfold(axis, size, step)
    return x.flatten(2 + len(sizes))


def _rounded_up(x: Tensor, sizes: list[int], strides: list[int], amounts: list[int]) -> list[int]:
    """Return the elements after each axis that windows hanging over its end need, flat pairs.

    A window takes part if it starts on an element or on the padding before the first one. Without
    padding, coremltools counts one that starts behind the last element, too; it holds nothing.
    """
    more = []
    for axis, (size, step) in enumerate(zip(sizes, strides, strict=True)):
        before, after = amounts[2 * axis : 2 * axis + 2]
        if before != after:
            raise ArtifactError(f"rounds up with a padding of {before} before and {after} after")
        length = x.shape[2 + axis] + before + after
        windows = -(-(length - size) // step) + 1
        if (windows - 1) * step >= length - after:
            if not before:
                raise ArtifactError(f"has windows of {size} every {step} that hold no element")
            windows -= 1
        more += [0, max(0, (windows - 1) * step + size - length)]
    return more


def _padded(x: Tensor, amounts: list[int], value: float) -> Tensor:
    """Return x with flat (before, after) pairs of its spatial axes filled with value."""
    pairs = [amounts[at : at + 2] for at in range(0, len(amounts), 2)]
    return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value)


def _layout(
    x: Tensor,
    sizes: list[int],
    strides: list[int] | None,
    pad_type: str,
    pad: list[int] | None,
    ceil_mode: bool,
) -> tuple[list[int], list[int], list[int]]:
    """Return the strides, the padding, and what rounding up adds to it."""
    steps = strides or [1] * len(sizes)
    amounts = padding(x, sizes, pad_type, pad, steps)
    more = _rounded_up(x, sizes, steps, amounts) if ceil_mode else [0] * len(amounts)
    return steps, amounts, more


@op("max_pool", floats("x"), exact=True, fresh=True)
def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Return the largest element of each window of x [N, C, *D]; padding never is the largest."""
    steps, amounts, more = _layout(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    filled = _padded(_padded(x, amounts, -torch.inf), more, -torch.inf)
    return _windows(filled, kernel_sizes, steps).amax(-1)


@op("avg_pool", floats("x"), fresh=True)
def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
    exclude_padding_from_average: bool = False,
) -> Tensor:
    """Return the mean of each window of x [N, C, *D].

    Padding counts as zeros unless it is excluded; what rounding up adds never counts.
    """
    steps, amounts, more = _layout(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    present = torch.ones((1, 1, *x.shape[2:]), device=x.device)
    present = _padded(present, amounts, 0.0 if exclude_padding_from_average else 1.0)
    counts = _windows(_padded(present, more, 0.0), kernel_sizes, steps).sum(-1)
    filled = _padded(_padded(x, amounts, 0.0), more, 0.0)
    return _windows(filled, kernel_sizes, steps).sum(-1) / counts


@op("l2_pool", floats("x"), fresh=True)
def l2_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Return the square root of the sum of squares of each window of x [N, C, *D]."""
    steps, amounts, more = _layout(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    filled = _padded(_padded(x, amounts, 0.0), more, 0.0)
    return _windows(filled, kernel_sizes, steps).square().sum(-1).sqrt()
