"""What a text makes of the inputs of linear layers, summed up window by window.

    sums = Sums(weight)                                    # of the layers that get these inputs
    sums.add(inputs, others)
    moments = sums.means()

Sums are fp32, of products of a thousand tokens and more. What an entry of `X^T X` is then off is
some 1e-6 of the root of the product of its row's and its column's diagonal entries, so the matrix
is off by less than 1e-6 of its trace in any direction: for 8192 inputs a hundredth of the mean
diagonal, and damping adds five.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# Rows of a symmetric product that are computed at a time, from the diagonal on.
_STRIP = 512
# Tokens whose products are summed at a time: fewer would make for more roundings.
_TOGETHER = 1024


class Moments(NamedTuple):
    """Means over tokens, fp32, in units of the inputs' mean square.

    Attributes:
        hessian: `[in, in]`: outer products of the inputs with themselves.
        drift: Outer products with the inputs of how far the unquantized model's are from them,
            `[in, in]`, or the layers' outputs from those for its inputs, `[out, in]`.
        of_outputs: Whether it is the outputs' drift.
    """

    hessian: torch.Tensor
    drift: torch.Tensor
    of_outputs: bool

    def finite(self) -> bool:
        """Return whether no input was inf or NaN, or too large for squares."""
        return math.isfinite(float(self.hessian.sum() + self.drift.sum()))


class Sums:
    """The sums behind `Moments`.

    Args:
        weight: fp32 `[out, in]`: unquantized, of all the layers that get the same inputs.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        rows, columns = weight.shape
        self._weight = weight
        # Whether outputs are so few that it takes less to sum their products than the inputs'.
        self._few = 2 * rows < columns
        self._hessian = torch.zeros(columns, columns)
        self._largest: torch.Tensor | None = None
        self._drift = torch.zeros(rows if self._few else columns, columns)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, inputs: torch.Tensor, others: torch.Tensor) -> None:
        """Add what the layers get, and get in the unquantized model, fp32 `[tokens, in]` each."""
        self._waiting.append((inputs, others))
        if sum(len(inputs) for inputs, _ in self._waiting) >= _TOGETHER:
            self._sum_up()

    def _sum_up(self) -> None:
        inputs, others = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        if self._largest is None:  # in whose units squares neither overflow nor vanish
            self._largest = inputs.abs().max() if inputs.any() else torch.ones(())
        inputs, others = inputs / self._largest, others / self._largest
        for start in range(0, inputs.shape[1], _STRIP):
            strip = slice(start, start + _STRIP)
            self._hessian[strip, start:].addmm_(inputs[:, strip].T, inputs[:, start:])
        away = others - inputs
        if self._few:
            away = away @ self._weight.T
        self._drift.addmm_(away.T, inputs)

    def means(self) -> Moments:
        """Return the means; the sums are theirs from then on."""
        if self._waiting:
            self._sum_up()
        for start in range(0, len(self._hessian), _STRIP):
            strip, rest = slice(start, start + _STRIP), slice(start + _STRIP, None)
            self._hessian[rest, strip] = self._hessian[strip, rest].T
        total = float(self._hessian.diagonal().mean()) or 1.0
        return Moments(self._hessian.div_(total), self._drift.div_(total), self._few)
