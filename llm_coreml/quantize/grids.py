"""What values a stored weight can take: scales or tables first, then codes one column at a time.

    grid = grid_of(IntGroup(4, 32), weight, importance)
    codes = grid.nearest(7, weight[:, 7])                  # of the seventh input of every row
    grid.tensor(all_codes)                                 # what the lowering takes

Scales and tables are fp16 numbers from the beginning, so that codes are chosen for what is stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import singledispatch
from typing import final

import torch

from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.kmeans import kmeans
from llm_coreml.quantize.schemes import Codebook, IntChannel, IntGroup, Scheme
from llm_coreml.quantize.tensors import codebook_tensor, integer_tensor

# Shares of a group's largest weight at which its scale may end: less precision for the largest
# is more for the others.
_SHRINK = tuple(1 - step / 32 for step in range(20))
# As torchao's: the scale of a group of zeros is a number, too.
_SMALLEST_SCALE = torch.finfo(torch.float32).eps


class Grid(ABC):
    """The values that each element of one matrix `[rows, columns]` can be stored as."""

    @abstractmethod
    def nearest(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """Return the codes `[rows]` of the stored values nearest to `values` `[rows]`."""

    @abstractmethod
    def values(self, column: int, codes: torch.Tensor) -> torch.Tensor:
        """Return what `codes` `[rows]` of a column stand for, in the grid's type."""

    @abstractmethod
    def tensor(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the quantized matrix with these codes `[rows, columns]`."""


@final
class IntegerGrid(Grid):
    """Multiples of a scale, from `-2**(bits - 1)` to `2**(bits - 1) - 1` times.

    Args:
        scale: `[rows, groups]`, fp16 numbers above zero.
        group_size: Consecutive columns of a row that share one.
        bits: 2, 3, 4, 6 or 8.
    """

    def __init__(self, scale: torch.Tensor, group_size: int, bits: int) -> None:
        self.scale = scale
        self.group_size = group_size
        self.bits = bits

    def nearest(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        top = 2 ** (self.bits - 1) - 1
        return (values / self._scale(column)).round_().clamp_(-top - 1, top)

    def values(self, column: int, codes: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        return codes * self._scale(column)

    def tensor(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        return integer_tensor(codes.to(torch.int8), self.scale, None, self.bits)

    def _scale(self, column: int) -> torch.Tensor:
        return self.scale[:, column // self.group_size]


@final
class CodebookGrid(Grid):
    """The entries of a table for every few rows.

    Args:
        tables: `[tables, entries]`, fp16 numbers, ascending.
        scheme: How many rows share one, and bits.
    """

    def __init__(self, tables: torch.Tensor, scheme: Codebook) -> None:
        self.tables = tables
        self.scheme = scheme
        self._middles = ((tables[:, :-1] + tables[:, 1:]) / 2).contiguous()

    def nearest(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        grouped = values.contiguous().view(len(self.tables), -1)
        return torch.searchsorted(self._middles, grouped).view(-1)

    def values(self, column: int, codes: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        indices = codes.to(torch.int64).view(len(self.tables), -1)
        return self.tables.gather(1, indices).view(-1)

    def tensor(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        tables = self.tables.unsqueeze(1)
        return codebook_tensor(codes.to(torch.uint8), tables, self.scheme.bits)


@singledispatch
def grid_of(scheme: Scheme, weight: torch.Tensor, importance: torch.Tensor) -> Grid:
    """Choose the scales or tables of a matrix.

    Args:
        scheme: The format.
        weight: `[rows, columns]`, fp32 or fp64.
        importance: `[columns]`, above zero: what the squared error of a weight counts.

    Raises:
        UnsupportedError: the format has no codes to choose, or cannot hold a value.
    """
    raise UnsupportedError(f"'{scheme.name}' has no codes that calibration could choose.")


@grid_of.register
def _(scheme: IntGroup, weight: torch.Tensor, importance: torch.Tensor) -> Grid:
    _refuse_zero_points(scheme.zero_point)
    return _integer_grid(weight, importance, scheme.group_size, scheme.bits)


@grid_of.register
def _(scheme: IntChannel, weight: torch.Tensor, importance: torch.Tensor) -> Grid:
    _refuse_zero_points(scheme.zero_point)
    return _integer_grid(weight, importance, weight.shape[1], scheme.bits)


@grid_of.register
def _(scheme: Codebook, weight: torch.Tensor, importance: torch.Tensor) -> Grid:
    if scheme.columns is not None or scheme.vector > 1 or scheme.row_scale:
        raise UnsupportedError(
            f"'{scheme.label}' cannot be calibrated; leave --codebook-columns, --codebook-vector "
            "and --codebook-scale out."
        )
    shape = (scheme.tables((weight.shape[0], weight.shape[1]))[0], -1)
    weights = importance.expand_as(weight).reshape(shape)
    tables, _ = kmeans(weight.reshape(shape), scheme.bits, weights)
    return CodebookGrid(tables.to(weight.dtype), scheme)


def _refuse_zero_points(zero_point: str) -> None:
    if zero_point != "none":
        raise UnsupportedError(
            f"--zero-point {zero_point} cannot be calibrated; use --zero-point none."
        )


def _integer_grid(
    weight: torch.Tensor, importance: torch.Tensor, group_size: int, bits: int
) -> IntegerGrid:
    """Choose, for each group, the scale with the least weighted squared error."""
    top = 2 ** (bits - 1) - 1
    grouped = weight.view(len(weight), -1, group_size)
    counts = importance.view(1, -1, group_size)
    # The one code more below zero serves the side that reaches further.
    reach = torch.maximum(grouped.amax(2) / top, -grouped.amin(2) / (top + 1))
    best, least = torch.zeros_like(reach), torch.full_like(reach, torch.inf)
    for share in _SHRINK:
        scale = (reach * share).clamp_(min=_SMALLEST_SCALE).to(torch.float16).to(weight.dtype)
        wide = scale.unsqueeze(2)
        stored = (grouped / wide).round_().clamp_(-top - 1, top).mul_(wide)
        error = stored.sub_(grouped).square_().mul_(counts).sum(2)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    if not bool((best > 0).all()):
        raise UnsupportedError(
            f"a weight is {float(weight.abs().max()):g}, whose scale fp16 cannot hold; use "
            "another scheme, or scale the weights."
        )
    return IntegerGrid(best, group_size, bits)
