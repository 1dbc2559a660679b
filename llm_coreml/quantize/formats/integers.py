"""Codes, scales and zero points of integer formats from the weights alone.

    codes, scale, zero_point = integers(weight, bits=4, group_size=32, kind="int")
    (codes - spread(zero_point)) * spread(scale)           # weight again, nearly

A group's range is shrunk, and the share of it with the least squared error is kept: what the
outermost weights lose, the others win. The search goes from coarse to fine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.schemes import ZeroPoint

# Shares of a range that every group tries, and how far from the best of them it tries next, both
# ways. That takes 10 passes over the weights, and finds less error than all 32nds above a half.
_SHARES = (1.0, 0.875, 0.75, 0.625)
_NEARER = (1 / 16, 1 / 32, 1 / 64)
# With so many codes a smaller range gains next to nothing.
_UNSEARCHED = 8
# Least scale in shares of a group's largest weight: a float zero point stays within +-1024, where
# fp16 tells halves apart.
_LEAST = 2.0**-10
_SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal


def integers(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    kind: ZeroPoint,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize every row of `weight` `[rows, columns]`, any float type, group by group.

    Args:
        weight: Finite numbers.
        bits: Of a code.
        group_size: Consecutive columns that share a scale and a zero point.
        kind: An `int` zero point is one of the codes, so that zero is always stored exactly; a
            `float` one is any number of fp16; `none` is zero.
        importance: fp32 `[columns]`, above zero: what the squared error of a weight counts; None is
            one for all.

    Returns:
        Codes, int8 `[rows, columns]`; scales, fp32 numbers that fp16 holds, `[rows, groups]`, below
        zero where the one code more has to serve the positive side; and zero points, int8 or fp32
        numbers that fp16 holds, `[rows, groups]`, or None.

    Raises:
        UnsupportedError: fp16 cannot hold a scale.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grouped = weight.to(torch.float32).reshape(len(weight), -1, group_size)
    counts = None if importance is None else importance.view(1, -1, group_size)
    kept, shift = _search(grouped, low, high, kind, counts)
    codes = _codes(grouped, kept, shift, low, high).to(torch.int8).reshape(weight.shape)
    if shift is None:
        return codes, kept, None
    return codes, kept, shift.to(torch.int8) if kind == "int" else shift


def _search(
    grouped: torch.Tensor, low: int, high: int, kind: ZeroPoint, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales and zero points of groups, fp32 `[rows, groups, group_size]`."""
    bottom, top, largest = grouped.amin(2), grouped.amax(2), grouped.abs().amax(2)
    if kind == "int":
        bottom, top = bottom.clamp(max=0), top.clamp(min=0)
    full, sign = (top - bottom) / (high - low), torch.ones_like(top)
    if kind == "none":
        # The one code more below zero serves the side that reaches further.
        full = torch.maximum(largest / -low, torch.minimum(top, -bottom) / high)
        sign = torch.where(top > -bottom, -1.0, 1.0)
    floor = (largest * _LEAST).clamp(min=_SMALLEST_SCALE)
    root = None if counts is None else counts.sqrt()
    best = _Best(torch.full_like(full, torch.inf), torch.ones_like(full), full, full)
    stored = torch.empty_like(grouped)
    for share in _tried(best, high - low + 1):
        scale = (torch.maximum(full * share, floor) * sign).to(torch.float16).to(torch.float32)
        shrunk = (bottom + top) / 2 - share * (top - bottom) / 2
        zero = _zero_points(shrunk / scale, low, high, kind)
        _codes(grouped, scale, zero, low, high, stored)
        if zero is not None:
            stored.sub_(zero.unsqueeze(2))
        torch.addcmul(grouped, stored, scale.unsqueeze(2), value=-1, out=stored)
        error = torch.linalg.vector_norm(stored if root is None else stored.mul_(root), dim=2)
        best.keep(_Best(error, share, scale, scale if zero is None else zero))
    if not bool(torch.isfinite(best.error).all()):
        raise UnsupportedError(
            f"a weight is {float(largest.max()):g}, whose scale fp16 cannot hold; use another "
            "scheme, or scale the weights."
        )
    return best.scale, None if kind == "none" else best.zero


@dataclass
class _Best:
    """What is best so far, each `[rows, groups]`.

    Attributes:
        error: Of the groups.
        share: Of their ranges.
        scale: For those.
        zero: Zero points, if there are any.
    """

    error: torch.Tensor
    share: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def keep(self, other: _Best) -> None:
        """Take what is better there."""
        better = other.error < self.error
        self.error = torch.where(better, other.error, self.error)
        self.share = torch.where(better, other.share, self.share)
        self.scale = torch.where(better, other.scale, self.scale)
        self.zero = torch.where(better, other.zero, self.zero)


def _tried(best: _Best, codes: int) -> Iterator[torch.Tensor]:
    """Yield shares of the groups' ranges, the later ones near the best of the earlier."""
    ones = torch.ones_like(best.share)
    if codes >= 2**_UNSEARCHED:
        yield ones
        return
    for share in _SHARES:
        yield ones * share
    for distance in _NEARER:
        centre = best.share
        yield centre - distance
        yield (centre + distance).clamp(max=1)


def _zero_points(bottom: torch.Tensor, low: int, high: int, kind: ZeroPoint) -> torch.Tensor | None:
    """Return the zero points that give the `bottom` of a range, in scales, the lowest code."""
    if kind == "none":
        return None
    zero = low - bottom
    return zero.round_().clamp_(low, high) if kind == "int" else zero.half().float()


def _codes(
    grouped: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    low: int,
    high: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    codes = torch.div(grouped, scale.unsqueeze(2), out=out)
    if zero is not None:
        codes += zero.unsqueeze(2)
    return codes.round_().clamp_(low, high)
