"""Tables of few vectors for many: k-means in two or four dimensions, for many groups at a time.

    tables, codes = kmeans_vectors(values, bits=4)         # values [groups, n, width]
    tables.gather(1, codes.long().unsqueeze(2).expand_as(values))

Lloyd's iteration (1957) from centres that are spread as in k-means++ (Arthur and Vassilvitskii,
2007), with an even sequence in place of its random numbers, so that equal weights give equal
tables.
"""

from __future__ import annotations

import math

import torch

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.kmeans import FP16_MAX

# The steps that are taken on so many vectors for each centre, and then on all of them.
_STEPS, _LAST_STEPS = 20, 3
_SAMPLE = 128
# Distances that are held at a time.
_BLOCK = 1 << 22
_GOLDEN = (math.sqrt(5) - 1) / 2


def kmeans_vectors(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every group a table of `2**bits` vectors with a small squared error.

    Args:
        values: `[groups, n, width]`, any floating type.
        bits: 1 to 8.

    Returns:
        Tables `[groups, 2**bits, width]`, fp32 numbers that fp16 holds; and codes `[groups, n]`,
        uint8: for each vector the nearest entry.

    Raises:
        UnsupportedError: a value is not finite, or beyond fp16.
    """
    groups, n, width = values.shape
    tables = torch.empty((groups, 2**bits, width))
    codes = torch.empty((groups, n), dtype=torch.uint8)
    step = max(1, _BLOCK // max(1, n << bits))
    for start in range(0, groups, step):
        piece = slice(start, start + step)
        points = values[piece].to(torch.float32).contiguous()
        if not bool((points.abs() <= FP16_MAX).all()):  # also where one is NaN
            raise UnsupportedError(
                f"a value is {float(points.abs().max()):g}; a codebook holds fp16 numbers, which "
                f"end at {FP16_MAX:g}. Use another scheme for it, or scale the weights."
            )
        sample = points[:, :: -(-n // (_SAMPLE << bits))]
        centres = _lloyd(sample, _spread(sample, 2**bits), _STEPS)
        tables[piece] = _lloyd(points, centres, _LAST_STEPS).half().float()
        codes[piece] = _nearest(points, tables[piece]).to(torch.uint8)
    return tables, codes


def _spread(sample: torch.Tensor, entries: int) -> torch.Tensor:
    """Choose centres `[groups, entries, width]` from a sample, each far from those before it."""
    groups = torch.arange(len(sample))
    centres: list[torch.Tensor] = []
    distance = (sample - sample.mean(1, keepdim=True)).square().sum(2)
    for at in range(entries):
        total = distance.cumsum(1)
        share = (at + 1) * _GOLDEN % 1 * total[:, -1:]
        # Not the first of the share, which may be a centre, but the one that goes beyond it.
        place = torch.searchsorted(total, share, right=True)[:, 0]
        centres.append(sample[groups, place.clamp_(max=sample.shape[1] - 1)])
        found = (sample - centres[-1].unsqueeze(1)).square().sum(2)
        distance = distance.minimum(found) if at else found
    return torch.stack(centres, 1)


def _lloyd(points: torch.Tensor, centres: torch.Tensor, steps: int) -> torch.Tensor:
    """Move each centre to the mean of what is nearest to it; one that nothing is near to stays."""
    groups, entries, width = centres.shape
    first = torch.arange(groups).unsqueeze(1) * entries
    flat = points.reshape(-1, width).to(torch.float64)
    codes = torch.empty(0)
    for _ in range(steps):
        found = _nearest(points, centres)
        if torch.equal(found, codes):
            break
        codes = found
        places = (codes + first).flatten()
        sums = flat.new_zeros((groups * entries, width)).index_add_(0, places, flat)
        counts = places.bincount(minlength=groups * entries).view(groups, entries, 1)
        means = (sums.view(centres.shape) / counts.clamp(min=1)).to(torch.float32)
        centres = torch.where(counts > 0, means, centres)
    return centres


def _nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return which of `centres` `[groups, entries, width]` is nearest to each of `points`."""
    half = centres.square().sum(2).unsqueeze(1) / 2
    step = max(1, _BLOCK // (len(points) * centres.shape[1]))
    pieces = torch.split(points, step, 1)
    return torch.cat([(half - piece @ centres.mT).argmin(2) for piece in pieces], 1)
