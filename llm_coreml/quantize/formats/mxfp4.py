"""MXFP4: 4-bit floats, 32 of which share a power of two (OCP Microscaling Formats 1.0).

codes, exponents = mxfp4(weight)
mxfp4_tensor(codes, exponents)                         # weight again, nearly
"""

from __future__ import annotations

import torch

from llm_coreml.quantize.formats.schemes import MXFP4_GROUP

# The values of a code without its sign are these over two; see `tensors.MXFP4_ENTRIES`.
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MIDDLES = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
_SIGN = 8
# Half of two to this is the least that fp16 holds.
_LEAST = -23


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `weight` `[rows, columns]`, any float type of finite numbers that fp16 holds.

    The specification takes the exponent at which the largest weight of a group is in [4, 8), above
    what a code can say; the one at which it is in [2, 4) is tried, too, and the better one kept.

    Returns:
        Codes uint8 `[rows, columns]` and exponents int32 `[rows, columns / 32]`, without a bias.
    """
    grouped = weight.to(torch.float32).reshape(len(weight), -1, MXFP4_GROUP)
    # The largest is in [1/2, 1) times two to the exponent of frexp.
    first = torch.frexp(grouped.abs().amax(2)).exponent - 3
    best = torch.full(first.shape, torch.inf)
    exponents, codes = first, torch.zeros(grouped.shape, dtype=torch.uint8)
    for tried in (first, first + 1):
        tried = tried.clamp(min=_LEAST)
        wide = tried.unsqueeze(2)
        magnitudes = torch.searchsorted(_MIDDLES, torch.ldexp(grouped.abs(), -wide))
        stored = torch.ldexp(_MAGNITUDES[magnitudes], wide)
        error = (stored - grouped.abs()).square().sum(2)
        better = error < best
        best = torch.where(better, error, best)
        exponents = torch.where(better, tried, exponents)
        found = (magnitudes + _SIGN * (grouped < 0)).to(torch.uint8)
        codes = torch.where(better.unsqueeze(2), found, codes)
    return codes.reshape(weight.shape), exponents.to(torch.int32)
