"""Which operation of one program is which of another.

    first, second = Trace(), Trace()
    with program.observed(first): program(inputs)
    with other.observed(second): other(inputs)
    align(first.operations, second.operations)      # pairs of positions, ascending

Names say little: a converter numbers operations, and one more at the front renumbers the rest. So
the pairs are the longest common subsequence of (type, result shapes), and names settle ties. Of
these, a pair stays only if what the two compute from overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_coreml.artifact.limits import beyond
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.observe.watch import ATTENTION
from llm_coreml.reference.program.steps import Step, Values


@dataclass(frozen=True)
class Traced:
    """An operation as it ran.

    Attributes:
        name: name of its first result.
        kind: its type and the shapes of its results.
        layer: how many attention operations come before it.
        reads: places of its operands.
        writes: places of its results.
    """

    name: str
    kind: tuple[str, tuple[tuple[int, ...], ...]]
    layer: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]


class Trace:
    """An observer that lists the operations of a call.

    Attributes:
        operations: in the order in which they ran.
    """

    def __init__(self) -> None:
        self.operations: list[Traced] = []
        self._layer = 0

    def __call__(self, step: Step, values: Values) -> None:
        """Note `step`."""
        slots = tuple(output.slot for output in step.outputs)
        shapes = tuple(tuple(values[slot].shape) for slot in slots)
        kind = step.type, shapes
        self.operations.append(
            Traced(step.outputs[0].name, kind, self._layer, step.operands(), slots)
        )
        self._layer += step.type in ATTENTION


def align(first: Sequence[Traced], second: Sequence[Traced]) -> list[tuple[int, int]]:
    """Return pairs of positions in `first` and `second`, ascending in both.

    Raises:
        ArtifactError: the programs are so long and different that this machine cannot align them.
    """
    head = 0
    while head < min(len(first), len(second)) and first[head].kind == second[head].kind:
        head += 1
    tail = 0
    while (
        tail < min(len(first), len(second)) - head
        and first[-1 - tail].kind == second[-1 - tail].kind
    ):
        tail += 1
    middle = _longest_common(first[head : len(first) - tail], second[head : len(second) - tail])
    pairs = [(at, at) for at in range(head)]
    pairs += [(head + one, head + other) for one, other in middle]
    pairs += [(len(first) - at, len(second) - at) for at in range(tail, 0, -1)]
    return _consistent(first, second, pairs)


def _longest_common(first: Sequence[Traced], second: Sequence[Traced]) -> list[tuple[int, int]]:
    if excess := beyond(9 * len(first) * len(second)):
        raise ArtifactError(f"Aligning two such programs {excess}.")
    kinds = {kind: number for number, kind in enumerate({item.kind for item in second})}
    theirs = np.array([kinds[item.kind] for item in second], np.int64)
    names = np.array([item.name for item in second], object)
    # A pair counts so much that equal names only choose between alignments of equal length.
    worth = 1 + min(len(first), len(second))
    best = np.zeros((len(first) + 1, len(second) + 1), np.int64)
    for row, item in enumerate(first):
        gain = np.where(theirs == kinds.get(item.kind, -1), worth + (names == item.name), 0)
        taken = np.where(gain > 0, best[row, :-1] + gain, 0)
        best[row + 1, 1:] = np.maximum.accumulate(np.maximum(best[row, 1:], taken))
    pairs, row, column = [], len(first), len(second)
    while row and column:
        if best[row, column] == best[row - 1, column]:
            row -= 1
        elif best[row, column] == best[row, column - 1]:
            column -= 1
        else:
            row, column = row - 1, column - 1
            pairs.append((row, column))
    return pairs[::-1]


def _consistent(
    first: Sequence[Traced], second: Sequence[Traced], pairs: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Drop pairs whose nearest paired ancestors have nothing in common."""
    kept: list[tuple[int, int]] = []
    one, other = _Ancestors(first), _Ancestors(second)
    for pair in pairs:
        mine, theirs = one.upto(pair[0]), other.upto(pair[1])
        stays = bool(mine & theirs) or not (mine or theirs)
        if stays:
            kept.append(pair)
        one.settle(pair if stays else None)
        other.settle(pair if stays else None)
    return kept


class _Ancestors:
    """For each place, the pairs that its value was computed from, others looked through."""

    def __init__(self, operations: Sequence[Traced]) -> None:
        self._operations = operations
        self._next = 0
        self._of: dict[int, frozenset[tuple[int, int]]] = {}

    def upto(self, position: int) -> frozenset[tuple[int, int]]:
        """Pass over the operations before `position`; return the ancestors of the one there."""
        while self._next < position:
            self.settle(None)
        return self._sources(position)

    def settle(self, pair: tuple[int, int] | None) -> None:
        """Pass over the next operation, which is in `pair` or in none."""
        operation = self._operations[self._next]
        found = self._sources(self._next) if pair is None else frozenset({pair})
        self._of.update(dict.fromkeys(operation.writes, found))
        self._next += 1

    def _sources(self, position: int) -> frozenset[tuple[int, int]]:
        reads = self._operations[position].reads
        return frozenset().union(*(self._of.get(place, frozenset()) for place in reads))
