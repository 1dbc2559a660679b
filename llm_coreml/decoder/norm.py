"""RMSNorm that stays finite in fp16 for any fp16 input.

`mean(x * x)` overflows fp16 at |x| > 255. Any positive scale m leaves the result unchanged,
    x / sqrt(mean(x^2) + eps) = (x/m) / sqrt(mean((x/m)^2) + eps / m^2),
so the row is brought to a range of its own first: the widest in which the sum of its squares is
still an fp16 number. Beside one massive activation the others must not become so small that
their last bits are lost, or all of them where a device flushes subnormal numbers. The floor on m
keeps eps / m^2 an fp16 number, and sqrt(eps) is a normal one where eps is not.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_SMALLEST_SCALE = 2.0**-8
# Half of what fp16 holds, for the roundings on the way; and what eps allows for a short row.
_LARGEST_SUM = 2.0**15
_WIDEST = 8.0


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain (arXiv 1910.07467).

    Args:
        size: Width of the last axis.
        eps: Added to the mean square.
        gain: Whether there is one.
    """

    weight: nn.Parameter | None

    root_eps: torch.Tensor
    smallest_scale: torch.Tensor
    inverse_range: torch.Tensor

    def __init__(self, size: int, eps: float, gain: bool = True) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False) if gain else None
        # Tensors, because coremltools turns `number / tensor` into an inverse with an epsilon
        # of its own, and a one-sided clamp into a clip with an infinite bound.
        self.register_buffer("root_eps", torch.tensor([math.sqrt(eps)]), persistent=False)
        self.register_buffer("smallest_scale", torch.tensor([_SMALLEST_SCALE]), persistent=False)
        # A power of two: it changes no bit but where it saves some.
        inverse = 2.0 ** -math.floor(math.log2(min(_WIDEST, math.sqrt(_LARGEST_SUM / size))))
        self.register_buffer("inverse_range", torch.tensor([inverse]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x`; same shape and dtype."""
        largest = torch.maximum(x.abs().amax(dim=-1, keepdim=True), self.smallest_scale)
        scale = largest * self.inverse_range
        scaled = x / scale
        floor = self.root_eps / scale
        mean_square = (scaled * scaled).mean(dim=-1, keepdim=True)
        normed = scaled * torch.rsqrt(mean_square + floor * floor)
        return normed if self.weight is None else normed * self.weight
