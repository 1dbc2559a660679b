"""Windows of a text drawn again and again: where a mean lies, and the difference of two.

    low, high = interval(sums, counts)
    first, second = drawn([(sums, counts), (others, counts)])
    low, high = bounds(second - first)

The same windows are drawn for whatever has as many of them, so that differences are paired (Efron
and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 4000
_LEAST = 1000
# Numbers that are held: of very long texts fewer drawings are made.
_HELD = 1 << 22
_SEED = 20261129

Values = NDArray[np.float64]


def interval(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Return where 95 % of the ratios lie of sums by counts over windows drawn with replacement.

    Args:
        sums: Of each window.
        counts: Of each window, what the sums are divided by.
    """
    return bounds(drawn([(sums, counts)])[0])


def drawn(pairs: Sequence[tuple[Any, Any]]) -> list[Values]:
    """Return the ratios of sums by counts in every drawing, the same windows for all.

    Args:
        pairs: Sums and counts of each window, as many in each.
    """
    often = _drawings(len(pairs[0][0]))
    return [
        (often @ np.asarray(sums, np.float64)) / (often @ np.asarray(counts, np.float64))
        for sums, counts in pairs
    ]


def bounds(values: Values) -> tuple[float, float]:
    """Return between which two values 95 % of them lie."""
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(values, (tail, 1.0 - tail))
    return float(low), float(high)


@functools.lru_cache(2)
def _drawings(windows: int) -> Values:
    """Return how often each window is drawn, `[drawings, windows]`."""
    count = max(_LEAST, min(DRAWS, _HELD // windows))
    even = np.full(windows, 1 / windows)
    return np.random.default_rng(_SEED).multinomial(windows, even, count).astype(np.float64)
