"""What a format of quantized matrices is, and the checked tensors that it reads.

A matrix `layers.0.mlp.up_proj.weight` is stored as several tensors beside each other, its parts:
`layers.0.mlp.up_proj.qweight`, `.scales` and so on. A format names them and says what they mean;
scales are read apart from codes, so that a plan is made without reading the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NoReturn, final

import torch

from llm_coreml.checkpoint.checkpoint import WEIGHT_DTYPES, Checkpoint, type_name
from llm_coreml.checkpoint.matrix import Affine, values
from llm_coreml.errors import CheckpointError, UnsupportedError


@final
@dataclass(frozen=True)
class Parts:
    """The stored tensors of one quantized matrix.

    Attributes:
        checkpoint: The files, as they are.
        module: The name before the last dot, which all parts share.
    """

    checkpoint: Checkpoint
    module: str

    def __contains__(self, suffix: str) -> bool:
        return self._name(suffix) in self.checkpoint.names()

    def shape(self, suffix: str, dims: int = 2) -> tuple[int, ...]:
        """Return the shape of a part, none of whose `dims` sizes is zero."""
        found = self.checkpoint.shape(self._name(suffix))
        if len(found) != dims or 0 in found:
            raise self.error(f"{suffix} is {list(found)}, which is no {dims}-dimensional array")
        return found

    def dtype(self, suffix: str) -> torch.dtype:
        """Return the type of a part."""
        return self.checkpoint.dtype(self._name(suffix))

    def read(
        self, suffix: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = WEIGHT_DTYPES
    ) -> torch.Tensor:
        """Return a part of exactly this shape, of one of these types, on the CPU.

        Raises:
            CheckpointError: it has another shape or type, or cannot be read.
        """
        name = self._name(suffix)
        found, dtype = self.checkpoint.shape(name), self.checkpoint.dtype(name)
        if found != tuple(shape):
            raise self.error(f"{suffix} is {list(found)}, not {list(shape)}")
        if dtype not in dtypes:
            wanted = " or ".join(map(type_name, dtypes))
            raise self.error(f"{suffix} is {type_name(dtype)}, not {wanted}")
        return self.checkpoint.stored(name).cpu()

    def numbers(self, suffix: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a part of floating-point numbers as fp64."""
        return self.read(suffix, shape).to(torch.float64)

    def groups(self, columns: int, size: int) -> int:
        """Return how many groups of `size` inputs there are; -1 is one for all."""
        if size == -1:
            return 1
        if size < 1 or columns % size:
            raise self.error(f"its {columns} inputs do not divide into groups of {size}")
        return columns // size

    def order(self, suffix: str, columns: int, groups: int) -> torch.Tensor | None:
        """Return the inputs sorted by the group that a part gives each, int64 `[columns]`.

        None is their own order, and that of a part which is -1 throughout.
        """
        index = self.read(suffix, (columns,), (torch.int32, torch.int64)).to(torch.int64)
        low, high = int(index.min()), int(index.max())
        if low == high == -1:
            return None
        if low < 0 or high >= groups:
            wrong = low if low < 0 else high
            raise self.error(f"{suffix} names group {wrong}, and there are {groups}, from 0 on")
        if bool((torch.bincount(index, minlength=groups) != columns // groups).any()):
            raise self.error(f"{suffix} gives its groups different numbers of inputs")
        order = torch.argsort(index, stable=True)
        return None if torch.equal(order, torch.arange(columns)) else order

    def codes_in(self, suffix: str, words: int, bits: int) -> int:
        """Return how many codes of `bits` are in `words` of 32 bits, which they fill."""
        if words * 32 % bits:
            raise self.error(f"{suffix} has {words} words, which codes of {bits} bits do not fill")
        return words * 32 // bits

    def error(self, what: str) -> CheckpointError:
        """Return the error that says `what` of this matrix."""
        return CheckpointError(
            f"'{self.module}' in '{self.checkpoint.source.name}': {what}. Download the checkpoint "
            "again, or quantize the model again."
        )

    def _name(self, suffix: str) -> str:
        return f"{self.module}.{suffix}"


class PackedFormat(ABC):
    """How one tool stores a quantized matrix.

    Attributes:
        label: The format, as people call it.
        suffixes: The parts that every matrix has.
        optional: Parts that it may have.
        beside: Parts of activations, which are not quantized here: left out, and told.
    """

    label: str
    suffixes: tuple[str, ...]
    optional: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def holds(self, parts: Parts) -> bool:
        """Say whether parts of these names are of this format, by their types."""
        return True

    @abstractmethod
    def shape(self, parts: Parts) -> tuple[int, int]:
        """Return rows (outputs) and columns (inputs), from the shapes of the parts."""

    @abstractmethod
    def scales(self, parts: Parts) -> Affine:
        """Return what codes mean, from the scales and zero points.

        Raises:
            CheckpointError: a part has a wrong shape, type or value.
            UnsupportedError: the matrix is right but cannot be held.
        """

    @abstractmethod
    def codes(self, parts: Parts) -> torch.Tensor:
        """Return the signed codes, int8 `[rows, columns]`. Raises CheckpointError."""

    def values(self, parts: Parts) -> torch.Tensor:
        """Return what the codes stand for, fp32 `[rows, columns]`, inputs in their own order.

        Raises:
            CheckpointError: as `scales` and `codes`.
            UnsupportedError: as `scales`.
        """
        found, order = values(self.codes(parts), self.scales(parts)), self.order(parts)
        return found if order is None else found[:, torch.argsort(order)]

    def order(self, parts: Parts) -> torch.Tensor | None:
        """Return which input each column of `codes` belongs to, int64 `[columns]`; None is its own.

        Raises:
            CheckpointError: it is no order.
        """
        return None


class ValueFormat(PackedFormat):
    """A format of which only `shape` and `values` are read: Core ML cannot hold its codes."""

    def scales(self, parts: Parts) -> NoReturn:
        """See `PackedFormat`; always raises UnsupportedError."""
        raise UnsupportedError(
            f"'{parts.module}' in '{parts.checkpoint.source.name}' is stored as {self.label}, "
            "which Core ML cannot hold as it is. Give --bits 4 (or 8, or 16 for no quantization), "
            "which quantizes its values again."
        )

    def codes(self, parts: Parts) -> NoReturn:
        """See `PackedFormat`; always raises UnsupportedError."""
        self.scales(parts)

    @abstractmethod
    def values(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
