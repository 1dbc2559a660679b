"""Normalizations, computed in fp32."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Tensor, floats, op


@op("layer_norm", floats("x"), fresh=True)
def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Return x normalized to mean 0 and variance 1 over axes, times gamma plus beta."""
    rank = x.dim()
    chosen = {axis % rank for axis in (range(rank) if axes is None else axes)}
    over = sorted(chosen)
    shape = [x.shape[axis] if axis in chosen else 1 for axis in range(rank)]
    centred = x - x.mean(over, keepdim=True)
    variance = centred.square().mean(over, keepdim=True)
    result = centred / torch.sqrt(variance + epsilon)
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


@op("batch_norm", floats("x"), fresh=True)
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Return x [N, C, ...] normalized per channel with given mean [C] and variance [C]."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale = torch.rsqrt(variance + epsilon)
    if gamma is not None:
        scale = scale * gamma
    result = (x - mean.reshape(shape)) * scale.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


@op("instance_norm", floats("x"), fresh=True)
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    """Return x [N, C, *D] normalized over D, times gamma [C] plus beta [C]."""
    over = list(range(2, x.dim()))
    centred = x - x.mean(over, keepdim=True)
    result = centred / torch.sqrt(centred.square().mean(over, keepdim=True) + epsilon)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if gamma is not None:
        result = result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


@op("l2_norm", floats("x"), fresh=True)
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return x divided by its Euclidean norm over the last three axes."""
    flat = x.reshape(*x.shape[:-3], math.prod(x.shape[-3:]))
    norm = torch.sqrt(flat.square().sum(-1, keepdim=True) + epsilon)
    return (flat / norm).reshape(x.shape)


@op("local_response_norm", floats("x"), fresh=True)
def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Return x [N, C, *D] over (k + alpha * mean of squares in `size` channels around) ** beta.

    Channels beyond the first and last count as zeros.

    Raises:
        ArtifactError: size is even; no rule says on which side the additional channel lies.
    """
    if size % 2 == 0:
        raise ArtifactError(f"looks at {size} channels; only an odd number has a middle")
    padded = F.pad(x.square().movedim(1, -1), [size // 2, size // 2])
    mean = padded.unfold(-1, size, 1).mean(-1).movedim(-1, 1)
    return x / (k + alpha * mean) ** beta
