"""RMSNorm that stays finite in fp16 for any fp16 input.

`mean(x * x)` overflows fp16 at |x| > 255. Any positive scale m leaves the result unchanged,
    x / sqrt(mean(x^2) + eps) = (x/m) / sqrt(mean((x/m)^2) + eps / m^2),
so the row is divided by its own largest magnitude first. The floor on m keeps eps / m^2 below
one, and sqrt(eps) is a normal fp16 number where eps is not.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_SMALLEST_SCALE = 2.0**-8


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain (arXiv 1910.07467).

    Args:
        size: Width of the last axis.
        eps: Added to the mean square.
    """

    root_eps: torch.Tensor
    smallest_scale: torch.Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        # Tensors, because coremltools turns `number / tensor` into an inverse with an epsilon
        # of its own, and a one-sided clamp into a clip with an infinite bound.
        self.register_buffer("root_eps", torch.tensor([math.sqrt(eps)]), persistent=False)
        self.register_buffer("smallest_scale", torch.tensor([_SMALLEST_SCALE]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x`; same shape and dtype."""
        scale = torch.maximum(x.abs().amax(dim=-1, keepdim=True), self.smallest_scale)
        scaled = x / scale
        floor = self.root_eps / scale
        mean_square = (scaled * scaled).mean(dim=-1, keepdim=True)
        return scaled * torch.rsqrt(mean_square + floor * floor) * self.weight
