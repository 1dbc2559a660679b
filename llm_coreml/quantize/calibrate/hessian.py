"""The Hessian of layers that get the same inputs, damped and factored once for all of them.

    hessian = Hessian.of(inputs.T @ inputs / len(inputs))
    change = hessian.solve(gradient)                       # gradient @ H^-1
    error = hessian.root(change).square().sum(1)           # of each row: change H change^T

A text says little of most directions in which weights can move: damping keeps them where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from llm_coreml.errors import CheckpointError

# A text of some thousand tokens does not tell more than that: with less, codes fit its noise.
DAMPING = 0.05
_TRIES = 8
# Columns of a triangular product that are computed at a time, without the zeros.
_STRIP = 512


class Hessian(NamedTuple):
    """A positive definite matrix of `n` rows, fp32 or fp64, as a product `R R^T`.

    Attributes:
        matrix: `[n, n]`.
        order: int64 `[n]`, the columns by rising diagonal.
        lower: `[n, n]`, R with its rows in that order, a lower triangle.
    """

    matrix: torch.Tensor
    order: torch.Tensor
    lower: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor) -> Hessian:
        """Damp a mean outer product of inputs with themselves until it can be factored.

        Args:
            moment: `[n, n]`, which is overwritten.

        Raises:
            CheckpointError: no damping is enough.
        """
        diagonal, damping = moment.diagonal().clone(), DAMPING
        order = torch.argsort(diagonal, descending=True, stable=True).flip(0)
        failed = torch.empty((), dtype=torch.int32)
        for _ in range(_TRIES):
            moment.diagonal().copy_(_damped(diagonal, damping))
            lower = moment[order.unsqueeze(1), order].T
            torch.linalg.cholesky_ex(lower, out=(lower, failed))  # in its place
            if not failed:
                return cls(moment, order, lower)
            damping *= 10
        raise CheckpointError(
            "the inputs that it gets cannot be told apart by numbers of any precision; give "
            "another text with --calibrate."
        )

    def diagonal(self) -> torch.Tensor:
        """Return its diagonal, `[n]`."""
        return self.matrix.diagonal().clone()

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows` `[any, n]` times the inverse."""
        rooted = rows[:, self.order]
        for start, stop in self._strips():
            part, corner = rooted[:, start:stop], self.lower[start:stop, start:stop]
            part -= rooted[:, :start] @ self.lower[start:stop, :start].T
            part.copy_(torch.linalg.solve_triangular(corner.T, part, upper=True, left=False))
        for start, stop in reversed(list(self._strips())):
            part, corner = rooted[:, start:stop], self.lower[start:stop, start:stop]
            part -= rooted[:, stop:] @ self.lower[stop:, start:stop]
            part.copy_(torch.linalg.solve_triangular(corner, part, upper=False, left=False))
        found = torch.empty_like(rooted)
        found[:, self.order] = rooted
        return found

    def root(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows` `[any, n]` times R: their squares sum up to those in the outputs."""
        ordered = rows[:, self.order]
        found = torch.empty_like(ordered)
        for start, stop in self._strips():
            torch.mm(ordered[:, start:], self.lower[start:, start:stop], out=found[:, start:stop])
        return found

    def back(self, rooted: torch.Tensor) -> torch.Tensor:
        """Return `rooted` `[any, n]` times the transpose of R."""
        found = torch.empty_like(rooted)
        for start, stop in self._strips():
            columns = self.order[start:stop]
            found[:, columns] = rooted[:, :stop] @ self.lower[start:stop, :stop].T
        return found

    def _strips(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self.order), _STRIP):
            yield start, min(start + _STRIP, len(self.order))


class Alike(NamedTuple):
    """The Hessian of inputs that nothing is known of: one for each, and nothing between them.

    Attributes:
        size: How many there are.
    """

    size: int

    def diagonal(self) -> torch.Tensor:
        """Return its diagonal, `[n]`."""
        return torch.ones(self.size)

    def root(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows` `[any, n]` as they are."""
        return rows

    def back(self, rooted: torch.Tensor) -> torch.Tensor:
        """Return `rooted` `[any, n]` as it is."""
        return rooted


def _damped(diagonal: torch.Tensor, damping: float) -> torch.Tensor:
    """Return `diagonal` `[n]` and a share of its mean.

    A column that no input ever reached has nothing to say: it is given the mean, and stays alone.
    """
    mean = diagonal.mean() if diagonal.any() else torch.ones_like(diagonal[0])
    return diagonal + torch.where(diagonal == 0, mean, damping * mean)
