"""How parameters come out of tensors that are stored in another arrangement.

    Rows(0, 2048, of=6144)             # the first of three matrices that are stored as one
    Blocks(0, 64, of=192, count=32)    # the same, where they are stored head by head
    Interleaved(heads=32, dim=64)      # rotated by pairs of neighbours, instead of halves
    Then(Rows(0, 2048, of=6144), Interleaved(heads=32, dim=64))
    Transposed()                       # a matrix stored [in, out]
    Columns(0, 768, of=2304)           # one of several such matrices that are stored as one
    Softplus()                         # a positive number, trained as the logarithm of one
    PlusOne()                          # a norm that is trained as the difference from one
    Product(512)                       # rows of a table times a matrix that widens them
    Stacked(8)                         # experts that are stored one by one
    Waves(1026, 64, period=31, first=2)      # positions that no file holds

Each says what it is made of, so that shapes are checked before data is read.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from llm_coreml.checkpoint.matrix import Packed
from llm_coreml.errors import UnsupportedError

Shape = tuple[int, ...]


class ValueMap(abc.ABC):
    """One arrangement. Its `repr` tells it from others, since cached weights follow from it.

    Attributes:
        keeps_codes: A matrix that is quantized already can be arranged so without its values.
    """

    keeps_codes: ClassVar[bool] = False

    @abc.abstractmethod
    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shapes of the stored tensors that a parameter of `shape` is made of."""

    @abc.abstractmethod
    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the parameter, fp32 as the stored tensors; it may share their memory."""

    def packed(self, stored: Packed) -> Packed:
        """Return the parameter of a quantized matrix, where `keeps_codes` says so."""
        raise NotImplementedError


class RowChoice(ValueMap):
    """Rows of one tensor: some of them, or all in another order."""

    keeps_codes: ClassVar[bool] = True

    @abc.abstractmethod
    def chosen(self, rows: int) -> slice | torch.Tensor:
        """Return which rows are taken of so many, int64 where they are no slice."""

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the rows."""
        return stored[0][self.chosen(len(stored[0]))]

    def packed(self, stored: Packed) -> Packed:
        """Return the rows' codes and levels; inputs have the same order in all rows."""
        rows, levels = self.chosen(len(stored.codes)), stored.levels
        if levels.tables is not None:
            levels = replace(levels, entries=_tables_of(levels.tables, rows, len(stored.codes)))
        zero_point = None if levels.zero_point is None else levels.zero_point[rows]
        mine = replace(
            levels, scale=levels.scale[rows], zero_point=zero_point, flat=levels.flat[rows]
        )
        return replace(stored, codes=stored.codes[rows].contiguous(), levels=mine)


@final
@dataclass(frozen=True)
class Rows(RowChoice):
    """Some rows of a tensor: one of several matrices that are stored as one.

    Attributes:
        start: The first row.
        stop: The row after the last.
        of: Rows of the whole tensor.
    """

    start: int
    stop: int
    of: int

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shape of the whole tensor."""
        return ((self.of, *shape[1:]),)

    def chosen(self, rows: int) -> slice:
        """Return the slice."""
        return slice(self.start, self.stop)


@final
@dataclass(frozen=True)
class Blocks(RowChoice):
    """Some rows of each block of a tensor: one of several matrices, stored block by block.

    Attributes:
        start: The first row within a block.
        stop: The row after the last.
        of: Rows of a block.
        count: How many blocks there are.
    """

    start: int
    stop: int
    of: int
    count: int

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shape of the whole tensor."""
        return ((self.of * self.count, *shape[1:]),)

    def chosen(self, rows: int) -> torch.Tensor:
        """Return the rows, block by block."""
        return torch.arange(rows).view(self.count, self.of)[:, self.start : self.stop].flatten()


@final
@dataclass(frozen=True)
class Interleaved(RowChoice):
    """Queries or keys that are rotated by pairs of neighbours, for a decoder that rotates halves.

    The scores of a head are the same in any order of its numbers that queries and keys share.

    Attributes:
        heads: How many there are.
        dim: How many numbers of a head are rotated, its first ones.
    """

    heads: int
    dim: int

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the same shape."""
        return (shape,)

    def chosen(self, rows: int) -> torch.Tensor:
        """Return of each head the even rows, the odd ones, and those that are not rotated."""
        head = torch.arange(rows).view(self.heads, -1)
        turned = head[:, : self.dim]
        return torch.cat((turned[:, ::2], turned[:, 1::2], head[:, self.dim :]), 1).flatten()


@final
@dataclass(frozen=True)
class InterleavedGain(ValueMap):
    """What heads' queries or keys are multiplied by before they are rotated by neighbours.

    Attributes:
        dim: As of `Interleaved`.
    """

    dim: int

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the same shape."""
        return (shape,)

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the gain, of one head or of each, in the order of the rows."""
        return stored[0][..., Interleaved(1, self.dim).chosen(stored[0].shape[-1])]


@final
@dataclass(frozen=True)
class ExchangedHalves(RowChoice):
    """Queries or keys that are rotated the other way round, for a decoder that does not.

    With the halves of a head exchanged, the numbers of each pair are, and so is the direction.

    Attributes:
        heads: How many there are.
    """

    heads: int

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the same shape."""
        return (shape,)

    def chosen(self, rows: int) -> torch.Tensor:
        """Return of each head the second half, then the first."""
        return torch.arange(rows).view(self.heads, 2, -1).flip(1).flatten()


@final
@dataclass(frozen=True)
class Then(ValueMap):
    """One choice of rows after another.

    Attributes:
        first: What is taken of the stored tensor.
        second: What is taken of that.
    """

    first: RowChoice
    second: RowChoice
    keeps_codes: ClassVar[bool] = True

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shape of the stored tensor."""
        (between,) = self.second.sources(shape)
        return self.first.sources(between)

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the rows."""
        return self.second.values([self.first.values(stored)])

    def packed(self, stored: Packed) -> Packed:
        """Return the rows' codes and levels."""
        return self.second.packed(self.first.packed(stored))


@final
@dataclass(frozen=True)
class Transposed(ValueMap):
    """A matrix that is stored `[in, out]`."""

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shape the other way round."""
        return (shape[::-1],)

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the matrix `[out, in]`."""
        return stored[0].T


@final
@dataclass(frozen=True)
class Columns(ValueMap):
    """Some columns of a matrix that is stored `[in, out]`, one of several stored as one.

    Attributes:
        start: The first column.
        stop: The column after the last.
        of: Columns of the whole.
    """

    start: int
    stop: int
    of: int

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shape of the whole."""
        return ((shape[1], self.of),)

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the matrix `[out, in]`."""
        return stored[0][:, self.start : self.stop].T


@final
@dataclass(frozen=True)
class Softplus(ValueMap):
    """Positive numbers that are trained as the inverse of softplus: `shift + ln(1 + exp(x))`.

    Attributes:
        shift: What is added.
    """

    shift: float = 0.0

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the same shape."""
        return (shape,)

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the numbers."""
        return torch.nn.functional.softplus(stored[0]) + self.shift


@final
@dataclass(frozen=True)
class PlusOne(ValueMap):
    """A gain that is stored as its difference from one."""

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the same shape."""
        return (shape,)

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the gain."""
        return stored[0] + 1


@final
@dataclass(frozen=True)
class Product(ValueMap):
    """A table whose rows a matrix widens, multiplied once and for all.

    Attributes:
        width: Of the rows as they are stored.
        reads: The matrix is stored as one that reads rows, `[out, in]`; else as one whose results
            the table reads.
    """

    width: int
    reads: bool = True

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shapes of the table and of the matrix."""
        rows, wide = shape
        matrix = (wide, self.width) if self.reads else (self.width, wide)
        return (rows, self.width), matrix

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the product."""
        table, matrix = stored
        return table @ (matrix.T if self.reads else matrix)


@final
@dataclass(frozen=True)
class Stacked(ValueMap):
    """Tensors of the same shape, stored one by one, as one with an axis more.

    Attributes:
        count: How many there are.
    """

    count: int

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shape of one, as often as there are."""
        return (shape[1:],) * self.count

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return all of them, the first axis counting."""
        return torch.stack(list(stored))


@final
@dataclass(frozen=True)
class Waves(ValueMap):
    """Positions as sines and cosines, made of nothing that is stored (arXiv 1706.03762).

    The first half of a row are sines of its position times `10000 ** (-n / period)`, n counting
    from 0, the second half cosines. An odd width ends in a zero.

    Attributes:
        rows: How many there are.
        width: Of one.
        period: See above.
        first: The position of the first row.
    """

    rows: int
    width: int
    period: int
    first: int = 0

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return nothing."""
        return ()

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the table."""
        counts = torch.arange(self.width // 2, dtype=torch.float64)
        positions = torch.arange(self.first, self.first + self.rows, dtype=torch.float64)
        angles = positions.outer(10000.0 ** (-counts / self.period))
        rest = torch.zeros(self.rows, self.width % 2)
        return torch.cat((angles.sin(), angles.cos(), rest), dim=1).to(torch.float32)


def _tables_of(tables: torch.Tensor, rows: slice | torch.Tensor, of: int) -> torch.Tensor:
    """Return the tables of some rows of a matrix that has `of` of them.

    Raises:
        UnsupportedError: these rows are not whole blocks with a table each.
    """
    if len(tables) == 1:
        return tables
    size = of // len(tables)
    owners = torch.arange(of)[rows] // size
    first = owners[::size]
    if len(owners) % size or not torch.equal(first.repeat_interleave(size), owners):
        raise UnsupportedError(
            f"Tables of {size} rows were trained of a matrix whose rows lie in another order here; "
            "train with one table for all rows: qat_config('codebook:BITS:whole')."
        )
    return tables[first]
