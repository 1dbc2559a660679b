"""Activations of 8 bits: what a layer gets or gives, rounded to one of 256 numbers.

    linear.entering = EightBit(scale=0.0125, zero_point=128)
    linear(x)                                     # reads x as 8 bits hold it

In an exported graph the rounding is the custom op `llm_coreml::as_eight_bit`, which the Core ML
lowering turns into `quantize` and `dequantize`.
"""

from __future__ import annotations

import torch
from torch import nn

_HIGHEST = 255


@torch.library.custom_op("llm_coreml::as_eight_bit", mutates_args=())
def as_eight_bit(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """Return `scale * (code - zero_point)` for the nearest code from 0 to 255, fp32.

    Args:
        x: Any float type and shape.
        scale: A number that fp16 holds.
        zero_point: The code of zero.
    """
    codes = torch.round(x.to(torch.float32) / scale) + zero_point
    return (codes.clamp(0, _HIGHEST) - zero_point) * scale


@as_eight_bit.register_fake
def _(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float32)


class EightBit(nn.Module):
    """Rounds to 8 bits, see `as_eight_bit`; what lies beyond the range becomes its end."""

    def __init__(self, scale: float, zero_point: int) -> None:
        super().__init__()
        self.scale = scale
        self.zero_point = zero_point

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the nearest of the 256 numbers for each of `x`."""
        rounded: torch.Tensor = as_eight_bit(x, self.scale, self.zero_point)
        return rounded

    def extra_repr(self) -> str:
        """Return both numbers."""
        return f"scale={self.scale:g}, zero_point={self.zero_point}"
