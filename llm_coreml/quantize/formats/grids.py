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
from llm_coreml.quantize.formats.integers import integers
from llm_coreml.quantize.formats.kmeans import kmeans
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Scheme
from llm_coreml.quantize.formats.tensors import codebook_tensor, integer_tensor

# Weights whose scales are searched at a time: a search passes over them again and again, so they
# should fit a core's cache.
_SEARCHED = 1 << 19


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
    """A scale times integers of so many bits, less the zero point.

    Args:
        scale: `[rows, groups]`, fp16 numbers other than zero.
        zero_point: `[rows, groups]`: int8, or fp16 numbers; None is zero.
        bits: 2, 3, 4, 6 or 8.
        group_size: Consecutive columns of a row that share one scale.
    """

    def __init__(
        self, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, group_size: int
    ) -> None:
        self.scale = scale
        self.zero_point = zero_point
        self.bits = bits
        self.group_size = group_size
        zeros = torch.zeros_like(scale) if zero_point is None else zero_point.to(scale.dtype)
        # [groups, rows]: what a column reads lies in one piece.
        self._scales, self._zeros = scale.T.contiguous(), zeros.T.contiguous()

    def nearest(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        group, top = column // self.group_size, 2 ** (self.bits - 1) - 1
        codes = values / self._scales[group] + self._zeros[group]
        return codes.round_().clamp_(-top - 1, top)

    def values(self, column: int, codes: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        group = column // self.group_size
        return (codes - self._zeros[group]) * self._scales[group]

    def tensor(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        return integer_tensor(codes.to(torch.int8), self.scale, self.zero_point, self.bits)


@final
class CodebookGrid(Grid):
    """The entries of a table for every block of rows and columns.

    Args:
        tables: `[row_groups, column_groups, entries]`, fp16 numbers, ascending.
        bits: Of a code.
        columns: Consecutive ones that share a table.
    """

    def __init__(self, tables: torch.Tensor, bits: int, columns: int) -> None:
        self.tables = tables
        self.bits = bits
        self.columns = columns
        # [column_groups, row_groups, entries]: what a column reads lies in one piece.
        self._entries = tables.transpose(0, 1).contiguous()
        self._middles = ((self._entries[..., :-1] + self._entries[..., 1:]) / 2).contiguous()

    def nearest(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        grouped = values.contiguous().view(len(self.tables), -1)
        return torch.searchsorted(self._middles[column // self.columns], grouped).view(-1)

    def values(self, column: int, codes: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        indices = codes.to(torch.int64).view(len(self.tables), -1)
        return self._entries[column // self.columns].gather(1, indices).view(-1)

    def tensor(self, codes: torch.Tensor) -> torch.Tensor:
        """See `Grid`."""
        return codebook_tensor(codes.to(torch.uint8), self.tables, self.bits)


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
    return _integer_grid(scheme, weight, importance, scheme.group_size)


@grid_of.register
def _(scheme: IntChannel, weight: torch.Tensor, importance: torch.Tensor) -> Grid:
    return _integer_grid(scheme, weight, importance, weight.shape[1])


@grid_of.register
def _(scheme: Codebook, weight: torch.Tensor, importance: torch.Tensor) -> Grid:
    if scheme.vector > 1 or scheme.row_scale:
        raise UnsupportedError(
            f"'{scheme.label}' cannot be calibrated; leave --codebook-vector and --codebook-scale "
            "out."
        )
    rows, columns = weight.shape
    row_groups, column_groups = scheme.tables((rows, columns))
    sizes = (row_groups, rows // row_groups, column_groups, columns // column_groups)

    def blocks(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.reshape(sizes).transpose(1, 2).flatten(2).flatten(0, 1)

    tables, _ = kmeans(blocks(weight), scheme.bits, blocks(importance.expand_as(weight)))
    tables = tables.to(weight.dtype).view(row_groups, column_groups, -1)
    return CodebookGrid(tables, scheme.bits, columns // column_groups)


def _integer_grid(
    scheme: IntGroup | IntChannel, weight: torch.Tensor, importance: torch.Tensor, group_size: int
) -> Grid:
    counts, bits, kind = importance.to(torch.float32), scheme.bits, scheme.zero_point
    pieces = torch.split(weight, max(1, _SEARCHED // weight.shape[1]))
    found = [integers(piece, bits, group_size, kind, counts)[1:] for piece in pieces]
    scales, zeros = zip(*found, strict=True)
    zero_point = None if kind == "none" else torch.cat(zeros)
    return IntegerGrid(torch.cat(scales).to(weight.dtype), zero_point, bits, group_size)
