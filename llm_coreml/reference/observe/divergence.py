"""Where two runs of the same operations part, and how their difference grows.

    parting = Parting(trace.operations)
    Lockstep(first, second, pairs, parting.compare, watches).run(...)
    parting.first(1e-2), parting.by_layer()

The error of a result is max|a - b| / max|a| over its elements, `a` being the first program's; see
`relative_error`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_coreml.reference.observe.alignment import Traced

# They give a whole cache, with what all layers wrote to it in earlier calls.
_STATES = frozenset({"read_state", "slice_update", "write_state"})


@dataclass
class Compared:
    """An operation of the first program beside its like in the second, over all calls.

    Attributes:
        name: name of its first result in the first program.
        type: its type.
        layer: how many attention operations come before it.
        errors: the error in each call; infinite where just one of the two is inf or NaN.
    """

    name: str
    type: str
    layer: int
    errors: list[float]

    @property
    def error(self) -> float:
        """The largest error of all calls."""
        return max(self.errors)


class Parting:
    """Collects the errors of paired operations.

    Args:
        operations: the first program's, as traced.
    """

    def __init__(self, operations: Sequence[Traced]) -> None:
        self._traced = operations
        self._entries: dict[int, Compared] = {}

    @property
    def operations(self) -> tuple[Compared, ...]:
        """What was compared, in the order of the first program."""
        return tuple(self._entries.values())

    def compare(
        self, position: int, results: list[torch.Tensor], others: list[torch.Tensor]
    ) -> None:
        """Note the error of the operation at `position`, whose results in both are given."""
        if position not in self._entries:
            traced = self._traced[position]
            self._entries[position] = Compared(traced.name, traced.kind[0], traced.layer, [])
        self._entries[position].errors.append(max(map(relative_error, results, others)))

    def first(self, threshold: float) -> Compared | None:
        """Return the operation that is the first to exceed `threshold`, in the earliest call."""
        for errors in zip(*(entry.errors for entry in self.operations), strict=True):
            for entry, error in zip(self.operations, errors, strict=True):
                if error > threshold:
                    return entry
        return None

    def by_layer(self) -> tuple[Compared, ...]:
        """Return the operation with the largest error of each layer, states left out."""
        entries = [entry for entry in self.operations if entry.type not in _STATES]
        layers = sorted({entry.layer for entry in entries})
        return tuple(
            max((entry for entry in entries if entry.layer == layer), key=_error)
            for layer in layers
        )


def _error(entry: Compared) -> float:
    return entry.error


def relative_error(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return max|first - second| / max|first|; 0 if they are equal, infinities and NaN included.

    Where either is kept in fp16, a largest below fp16's smallest normal number counts as that: what
    fp16 rounds to zero there is no difference worth a report, and what it does later is one.

    Args:
        first: any element type.
        second: same shape; compared as numbers where the type differs.
    """
    floats = first.is_floating_point() and second.is_floating_point()
    wide = torch.float32 if floats else torch.float64  # exact for int32
    a, b = first.to(wide), second.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs())
    size = float(torch.where(a.isfinite(), a, torch.zeros_like(a)).abs().max())
    if floats and torch.float16 in (first.dtype, second.dtype):
        size = max(size, torch.finfo(torch.float16).smallest_normal)
    worst = float(difference.max())
    return worst / size if size and math.isfinite(worst) else math.inf
