"""Slopes of ALiBi: what a head's scores lose for each position of distance.

slopes(8)              # (0.5, 0.25, ..., 2**-8), as published with ALiBi
ordered_slopes(12)     # MPT's order, where heads are no power of two

A series whose ratio the number of heads gives; where that is no power of two, every second one of
the next series fills it up (arXiv 2108.12409).
"""

from __future__ import annotations


def slopes(heads: int) -> tuple[float, ...]:
    """Return the slope of each head: a whole series, then what is missing from the next."""
    whole = 1 << (heads.bit_length() - 1)
    return (*_series(whole), *_series(2 * whole)[: 2 * (heads - whole) : 2])


def ordered_slopes(heads: int) -> tuple[float, ...]:
    """Return the slope of each head: every second of the longer series, then those between."""
    whole = 1 << (heads - 1).bit_length()
    series = _series(whole)
    return series if whole == heads else (*series[1::2], *series[::2])[:heads]


def _series(count: int) -> tuple[float, ...]:
    return tuple(2.0 ** (-8 * number / count) for number in range(1, count + 1))
