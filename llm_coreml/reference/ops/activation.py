"""Activations and softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Tensor, floats, op


def _simple(name: str, function: Callable[[Tensor], Tensor], *, exact: bool = False) -> None:
    def kernel(x: Tensor) -> Tensor:
        return function(x)

    op(name, floats("x"), exact=exact, fresh=True)(kernel)


def _softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + torch.relu(x)


_simple("relu", torch.relu, exact=True)
_simple("relu6", lambda x: torch.clamp(x, 0, 6), exact=True)
_simple("sigmoid", torch.sigmoid)
_simple("silu", F.silu)
_simple("softsign", F.softsign)
_simple("softplus", _softplus)


@op("softmax", floats("x"), fresh=True)
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Return exp(x) over its sum along axis; a row of -inf alone gives NaN."""
    return torch.softmax(x, axis)


@op("gelu", floats("x"), fresh=True)
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """Return the Gaussian error linear unit in one of MIL's three forms."""
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ArtifactError(f"has the unknown mode '{mode}'")


@op("leaky_relu", floats("x"), fresh=True)
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """Return x, or alpha * x where x is negative."""
    return F.leaky_relu(x, alpha)


@op("elu", floats("x"), fresh=True)
def elu(x: Tensor, alpha: float) -> Tensor:
    """Return x, or alpha * (exp(x) - 1) where x is negative."""
    return F.elu(x, alpha)


@op("prelu", floats("x"), fresh=True)
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """Return x [N, C, ...], or alpha [C] * x where x is negative."""
    return F.prelu(x, alpha)


@op("linear_activation", floats("x"), fresh=True)
def linear_activation(x: Tensor, alpha: float, beta: float = 0.0) -> Tensor:
    """Return alpha * x + beta."""
    return alpha * x + beta


@op("clamped_relu", floats("x"), fresh=True)
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return min(x, beta), or min(alpha * x, beta) where x is negative."""
    return torch.clamp(torch.where(x >= 0, x, alpha * x), max=beta)


@op("scaled_tanh", floats("x"), fresh=True)
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return alpha * tanh(beta * x)."""
    return alpha * torch.tanh(beta * x)


@op("sigmoid_hard", floats("x"), fresh=True)
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """Return alpha * x + beta, limited to [0, 1]."""
    return torch.clamp(alpha * x + beta, 0, 1)


# The bounds of the next, and of its like, may be fp32 numbers that fp16 does not hold.
@op("thresholded_relu", floats("x"), exact=True, fresh=True, half=False)
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """Return x, or 0 where x is below alpha."""
    return torch.where(x >= alpha, x, 0.0)


@op("softplus_parametric", floats("x"), fresh=True)
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return alpha * log(1 + exp(beta * x)) with alpha and beta [C] for x [N, C, ...]."""
    sizes = [-1] + [1] * (x.dim() - 2)
    return alpha.reshape(sizes) * _softplus(beta.reshape(sizes) * x)
