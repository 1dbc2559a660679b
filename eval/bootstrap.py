"""Intervals of means by bootstrap over windows, the same windows drawn for every model.

low, high = interval(sums, counts)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DRAWS = 1000
_SEED = 20261129
_TAIL = 0.025


def interval(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Return where 95 % of the ratios lie of sums by counts over windows drawn with replacement.

    Args:
        sums: Of each window.
        counts: Of each window, what the sums are divided by.
    """
    drawn = np.random.default_rng(_SEED).integers(0, len(sums), (_DRAWS, len(sums)))
    ratios = np.asarray(sums)[drawn].sum(1) / np.asarray(counts)[drawn].sum(1)
    low, high = np.quantile(ratios, (_TAIL, 1 - _TAIL))
    return float(low), float(high)
