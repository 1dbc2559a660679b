"""Where matrices are cut by rows, for hardware that takes narrower ones.

    cuts = Cuts(linear=1024, widest=16384, gather=65535)
    cuts.of_linear(8192, unit=16)        # [0, 1024, ..., 8192]
    cuts.of_table(128256, unit=1)        # [0, 64128, 128256]

A part gives the sums that the whole matrix gave, so that nothing is rounded otherwise. The sizes
are those of ExecuTorch's static Llama script (`SplitLinearModule`): as many parts as fit whole,
eight at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

MOST_PARTS = 8


@dataclass(frozen=True)
class Cuts:
    """What is cut.

    Attributes:
        linear: A linear layer is cut into parts of as many outputs, or more where it would be more
            than eight parts; None leaves it whole.
        widest: No part of a linear layer gives more outputs than this.
        gather: No table of tokens has more rows than this.
    """

    linear: int | None = None
    widest: int | None = None
    gather: int | None = None

    def of_linear(self, rows: int, unit: int) -> list[int]:
        """Return where the parts of a linear layer begin, and where the last one ends.

        Args:
            rows: What it gives.
            unit: Rows that belong together, as they share a table or a scale.
        """
        parts = 1 if self.linear is None else min(max(rows // self.linear, 1), MOST_PARTS)
        return _bounds(rows, unit, max(parts, _parts(rows, unit, self.widest)))

    def of_table(self, rows: int, unit: int) -> list[int]:
        """Return the same of a table that rows are taken out of."""
        return _bounds(rows, unit, _parts(rows, unit, self.gather))


WHOLE = Cuts()


def _parts(rows: int, unit: int, most: int | None) -> int:
    """Return how many parts there are of `most` rows or less; one where a unit is longer."""
    if most is None or most < unit:
        return 1
    return -(-rows // (most - most % unit))


def _bounds(rows: int, unit: int, parts: int) -> list[int]:
    units = -(-rows // unit)
    parts = min(parts, units)
    return [min(units * part // parts * unit, rows) for part in range(parts + 1)]


def unit_of_blocks(rows: int, blocks: list[int], width: int) -> int:
    """Return how many rows belong together.

    Args:
        rows: Of the matrix.
        blocks: Numbers of blocks that rows are in; what all rows share divides none of them.
        width: Rows of one entry of a table.
    """
    return math.lcm(width, *(rows // count for count in blocks if count > 1))


def ranges(bounds: list[int]) -> list[tuple[int, int]]:
    """Return first row and end of each part."""
    return list(pairwise(bounds))
