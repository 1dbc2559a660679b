"""Scales and zero points for groups of weights that are not centred on zero.

    codes, scale, zero_point = asymmetric(weight, bits=4, group_size=32, kind="int")
    (codes - spread(zero_point)) * spread(scale)           # weight again, nearly

A group's range is shrunk step by step, and the step with the least squared error is kept: what the
outermost weights lose, the others win.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from llm_coreml.errors import UnsupportedError

_SHRINK = tuple(1 - step / 32 for step in range(16))
# Least scale in shares of a group's largest weight: a float zero point stays within +-1024, where
# fp16 tells halves apart.
_LEAST = 2.0**-10
_SMALLEST_SCALE = torch.finfo(torch.float16).smallest_normal


class Integers(NamedTuple):
    """A matrix `(codes - zero_point) * scale`.

    Attributes:
        codes: int8 `[rows, columns]`.
        scale: fp32 numbers that fp16 holds, above zero, `[rows, groups]`.
        zero_point: int8, or fp32 numbers that fp16 holds, `[rows, groups]`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor


def asymmetric(
    weight: torch.Tensor, bits: int, group_size: int, kind: Literal["int", "float"]
) -> Integers:
    """Quantize every row of `weight` `[rows, columns]`, any float type, group by group.

    Args:
        weight: Finite numbers.
        bits: Of a code.
        group_size: Consecutive columns that share a scale and a zero point.
        kind: An `int` zero point is one of the codes, so that zero is always stored exactly; a
            `float` one is any number of fp16.

    Raises:
        UnsupportedError: fp16 cannot hold a scale.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grouped = weight.to(torch.float32).reshape(len(weight), -1, group_size)
    bottom, top = grouped.amin(2), grouped.amax(2)
    if kind == "int":
        bottom, top = bottom.clamp(max=0), top.clamp(min=0)
    middle, reach = (bottom + top) / 2, (top - bottom) / 2
    floor = (grouped.abs().amax(2) * _LEAST).clamp(min=_SMALLEST_SCALE)
    best = torch.full_like(reach, torch.inf)
    kept_scale, kept_zero = torch.ones_like(reach), torch.zeros_like(reach)
    for share in _SHRINK:
        scale = torch.maximum(2 * reach * share / (high - low), floor).to(torch.float16)
        scale = scale.to(torch.float32)
        zero = (low + high) / 2 - middle / scale
        zero = zero.round_().clamp_(low, high) if kind == "int" else zero.half().float()
        wide, shift = scale.unsqueeze(2), zero.unsqueeze(2)
        stored = (grouped / wide + shift).round_().clamp_(low, high).sub_(shift).mul_(wide)
        error = stored.sub_(grouped).square_().sum(2)
        better = error < best
        best = torch.where(better, error, best)
        kept_scale = torch.where(better, scale, kept_scale)
        kept_zero = torch.where(better, zero, kept_zero)
    if not bool(torch.isfinite(best).all()):
        raise UnsupportedError(
            f"a weight is {float(weight.abs().max()):g}, whose scale fp16 cannot hold; use another "
            "scheme, or scale the weights."
        )
    codes = (grouped / kept_scale.unsqueeze(2) + kept_zero.unsqueeze(2)).round_().clamp_(low, high)
    zero_point = kept_zero.to(torch.int8) if kind == "int" else kept_zero
    return Integers(codes.to(torch.int8).reshape(weight.shape), kept_scale, zero_point)
