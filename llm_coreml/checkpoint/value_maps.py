"""How parameters come out of tensors that are stored in another arrangement.

    Rows(0, 2048, of=6144)             # the first of three matrices that are stored as one
    Transposed()                       # a matrix stored [in, out]
    PlusOne()                          # a norm that is trained as the difference from one
    Stacked(8)                         # experts that are stored one by one

Each says what it is made of, so that shapes are checked before data is read.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from llm_coreml.checkpoint.matrix import Packed

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


@final
@dataclass(frozen=True)
class Rows(ValueMap):
    """Some rows of a tensor: one of several matrices that are stored as one.

    Attributes:
        start: The first row.
        stop: The row after the last.
        of: Rows of the whole tensor.
    """

    start: int
    stop: int
    of: int
    keeps_codes: ClassVar[bool] = True

    def sources(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shape of the whole tensor."""
        return ((self.of, *shape[1:]),)

    def values(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the rows."""
        return stored[0][self.start : self.stop]

    def packed(self, stored: Packed) -> Packed:
        """Return the rows' codes and levels; inputs have the same order in all rows."""
        rows, levels = slice(self.start, self.stop), stored.levels
        zero_point = None if levels.zero_point is None else levels.zero_point[rows]
        mine = replace(
            levels, scale=levels.scale[rows], zero_point=zero_point, flat=levels.flat[rows]
        )
        return replace(stored, codes=stored.codes[rows].contiguous(), levels=mine)


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
