"""A model's constants as tensors: decoded once, shared by all functions, expanded within a budget.

A weight is a `Constant`, whose values the file holds, or an `Expression`: a compressed constant
that an operation on other constants gives. Either can be computed by rows, so expanding a large one
takes little more than its result, and one that does not fit the budget stays packed: it is expanded
slice by slice whenever it is used.

    pool = ConstantPool(numerics("declared"), torch.device("cpu"), budget=8 << 30)
    weight = pool.held(expression, wide=True)      # a tensor, or a PackedWeight
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from llm_coreml.artifact.dtypes import DTYPES
from llm_coreml.artifact.limits import FAILURES, beyond, reason
from llm_coreml.artifact.mil import Constant, TensorType, fixed_shape
from llm_coreml.errors import ArtifactError
from llm_coreml.machine import machine_memory
from llm_coreml.reference.ops import Spec
from llm_coreml.reference.ops.storage import storage, to_tensor
from llm_coreml.reference.program.numerics import Numerics

# Elements that one slice of a large constant has about.
_SLICE = 1 << 20
# Smaller constants are always expanded: keeping them packed saves nothing.
_SMALL = 1 << 16
# The first element of a slice of packed rows must begin a byte.
_BYTE = 8

# Real ones nest three deep: a table of integers, scaled, with zeros put between.
_DEEPEST = 8

Key = tuple[bytes, bool]


@dataclass(frozen=True, eq=False)
class Expression:
    """A compressed constant.

    Attributes:
        label: operation's name and type, for errors.
        spec: the operation.
        operands: its tensors, by parameter.
        plain: its other parameters.
        type: declared type of the result.
        number: which of the operation's results it is.
    """

    label: str
    spec: Spec
    operands: Mapping[str, Source]
    plain: Mapping[str, Any]
    type: TensorType
    number: int = 0

    def __post_init__(self) -> None:
        if self.depth > _DEEPEST:
            raise ArtifactError(f"{self.label} nests constants deeper than {_DEEPEST}.")

    @cached_property
    def depth(self) -> int:
        """How many expressions lie within one another, this one included."""
        nested = (operand for operand in self.operands.values() if isinstance(operand, Expression))
        return 1 + max((operand.depth for operand in nested), default=0)

    @cached_property
    def key(self) -> bytes:
        """Digest of what the value is computed from."""
        parts = [repr((id(self.spec), str(self.type), self.number)).encode()]
        for name, operand in self.operands.items():
            parts += [name.encode(), _digest(operand)]
        parts += [repr(item).encode() for item in self.plain.items()]
        return hashlib.sha256(b"|".join(parts)).digest()

    @cached_property
    def sliceable(self) -> bool:
        """Whether rows can be computed from rows of the operands."""
        shapes = {
            name: fixed_shape(_type(source), self.label) for name, source in self.operands.items()
        }
        total = fixed_shape(self.type, self.label)
        rank = len(total)
        # One row of indices into vectors along the rows is several rows, of which none is its own.
        vectors = rank > 0 and self.plain.get("vector_axis", 1) % rank == 0
        return (
            set(self.operands) <= set(self.spec.rows)
            and rank > 0
            and not (vectors and shapes.get("indices", (1,))[0] == 1)
            and "shape" not in self.plain
            and all(shape and shape[0] and total[0] % shape[0] == 0 for shape in shapes.values())
        )

    def unit(self) -> int:
        """Return the number of rows that a slice's start must be a multiple of."""
        total = fixed_shape(self.type, self.label)[0]
        if not self.sliceable:
            return max(1, total)
        units = [1]
        for source in self.operands.values():
            count = fixed_shape(_type(source), self.label)[0]
            if count > 1:
                units.append(total // count * unit(source))
        return math.lcm(*units)


Source = Constant | Expression


def unit(source: Source) -> int:
    """Return the number of rows of `source` that a slice's start must be a multiple of."""
    if isinstance(source, Expression):
        return source.unit()
    return _BYTE if DTYPES[_type(source).dtype].bits < _BYTE else 1


def _type(source: Source) -> TensorType:
    if not isinstance(source.type, TensorType):
        raise ArtifactError(f"A {source.type} is used as a tensor.")
    return source.type


def rows(source: Source, start: int, stop: int, numerics: Numerics) -> torch.Tensor:
    """Return rows [start, stop) of `source` in the type that computes it, not yet rounded.

    Args:
        source: whose first axis is cut; `start` is a multiple of its `unit`.
        start: first row.
        stop: row after the last; a multiple of the unit, or the number of rows.
        numerics: how the expressions that it depends on are rounded.

    Raises:
        ArtifactError: the file contradicts itself.
    """
    if isinstance(source, Constant):
        return to_tensor(source.rows(start, stop), _type(source).dtype)
    if not source.sliceable:
        return whole(source, numerics)[start:stop]
    total = fixed_shape(source.type, source.label)[0]
    operands = {}
    for key, operand in source.operands.items():
        count = fixed_shape(_type(operand), source.label)[0]
        block = total // count
        operands[key] = (
            whole(operand, numerics)
            if count == 1
            else rows(operand, start // block, -(-stop // block), numerics)
        )
    return _compute(source, operands, stop - start, numerics)


def whole(source: Source, numerics: Numerics) -> torch.Tensor:
    """Return all of `source` in the type that computes it, not yet rounded; see `rows`."""
    if isinstance(source, Constant):
        value = source.value()
        if not isinstance(value, np.ndarray):
            raise ArtifactError(f"A {source.type} is used as a tensor.")
        return to_tensor(value, _type(source).dtype)
    operands = {key: whole(operand, numerics) for key, operand in source.operands.items()}
    return _compute(source, operands, None, numerics)


def _compute(
    source: Expression,
    operands: Mapping[str, torch.Tensor],
    count: int | None,
    numerics: Numerics,
) -> torch.Tensor:
    given = {
        key: _rounded(value, _type(source.operands[key]), numerics).to(value.dtype)
        if isinstance(source.operands[key], Expression)
        else value
        for key, value in operands.items()
    }
    try:
        result = source.spec.function(**given, **source.plain)
    except ArtifactError as error:
        raise ArtifactError(f"{source.label} {error}.") from error
    except FAILURES as error:
        raise ArtifactError(f"{source.label} fails: {reason(error)}") from error
    results = result if isinstance(result, tuple) else (result,)
    value: torch.Tensor = results[source.number]
    shape = fixed_shape(source.type, source.label)
    expected = shape if count is None else (count, *shape[1:])
    if tuple(value.shape) != expected or value.dtype != storage(source.type.dtype):
        raise ArtifactError(
            f"{source.label} gives {value.dtype}{list(value.shape)}; the program declares "
            f"{source.type}."
        )
    return value


def _slices(source: Source) -> Iterator[tuple[int, int]]:
    shape = fixed_shape(_type(source), "A constant")
    step = max(1, _SLICE * shape[0] // max(1, math.prod(shape)))
    step = -(-step // unit(source)) * unit(source)
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _in_slices(source: Source) -> bool:
    shape = fixed_shape(_type(source), "A constant")
    large = len(shape) > 0 and math.prod(shape) > _SMALL
    return large and (isinstance(source, Constant) or source.sliceable)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A constant that is expanded whenever it is used.

    Attributes:
        source: where its values come from.
        numerics: how they are rounded.
        device: where they are needed.
        wide: give what is declared fp16 as fp32.
    """

    source: Source
    numerics: Numerics
    device: torch.device
    wide: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the expanded constant."""
        return fixed_shape(_type(self.source), "A constant")

    @property
    def rows(self) -> int:
        """Size of the first axis."""
        return self.shape[0]

    def expand(self) -> torch.Tensor:
        """Return the whole constant."""
        return expanded(self.source, self.numerics, wide=self.wide).to(self.device)

    def slices(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (start, stop, rows), one slice after the other."""
        for start, stop in _slices(self.source):
            yield start, stop, self._rows(start, stop)

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the rows at `indices`, int64 [N] in [0, number of rows)."""
        if not indices.numel():
            return self.expand()[:0]
        step = unit(self.source)
        blocks, places = torch.unique(indices.cpu() // step, return_inverse=True)
        starts = [block * step for block in blocks.tolist()]
        parts = [self._rows(start, min(start + step, self.rows)) for start in starts]
        return torch.cat(parts)[(places * step).to(self.device) + indices % step]

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        part = rows(self.source, start, stop, self.numerics)
        dtype = _kept(_type(self.source), self.numerics, self.wide)
        return _rounded(part, _type(self.source), self.numerics).to(self.device, dtype)


def _rounded(value: torch.Tensor, declared: TensorType, numerics: Numerics) -> torch.Tensor:
    return value.to(numerics.held(declared.dtype)) if value.is_floating_point() else value


def _kept(declared: TensorType, numerics: Numerics, wide: bool) -> torch.dtype:
    return storage(declared.dtype) if wide else numerics.held(declared.dtype)


def expanded(source: Source, numerics: Numerics, *, wide: bool) -> torch.Tensor:
    """Return all of `source`, rounded as it is declared.

    Args:
        source: a constant or an expression.
        numerics: how values are rounded and kept.
        wide: keep what is declared fp16 as fp32.

    Raises:
        ArtifactError: the file contradicts itself, or the constant does not fit the memory.
    """
    declared = _type(source)
    dtype = _kept(declared, numerics, wide)
    if not _in_slices(source):
        return _rounded(whole(source, numerics), declared, numerics).to(dtype)
    shape = fixed_shape(declared, "A constant")
    if excess := beyond(math.prod(shape) * dtype.itemsize):
        raise ArtifactError(f"A constant of type {declared} {excess}.")
    result = torch.empty(shape, dtype=dtype)
    for start, stop in _slices(source):
        result[start:stop] = _rounded(rows(source, start, stop, numerics), declared, numerics)
    return result


class ConstantPool:
    """The tensors of a model's constants, each made once.

    Args:
        numerics: how values are rounded and kept.
        device: where the tensors lie.
        budget: bytes that large constants may take in all; further ones stay packed. None is
            half of the machine's memory.
    """

    def __init__(self, numerics: Numerics, device: torch.device, budget: int | None) -> None:
        self.numerics = numerics
        self.device = device
        self._left = machine_memory() // 2 if budget is None else budget
        self._tensors: dict[Key, torch.Tensor] = {}

    def with_ops(self, ops: Mapping[str, Spec]) -> ConstantPool:
        """Return a pool of the same tensors, for programs that compute by other operations."""
        pool = copy.copy(self)
        pool.numerics = replace(self.numerics, ops=ops)
        return pool

    def tensor(self, source: Source, *, wide: bool) -> torch.Tensor:
        """Return the values of `source`; see `expanded`."""
        key = self._key(source, wide)
        if key not in self._tensors:
            value = expanded(source, self.numerics, wide=wide).to(self.device)
            self._left -= value.nbytes if value.numel() > _SMALL else 0
            self._tensors[key] = value
        return self._tensors[key]

    def held(self, source: Source, *, wide: bool) -> torch.Tensor | PackedWeight:
        """Return the values of `source`, or a packed weight where they exceed the budget."""
        declared = _type(source)
        elements = math.prod(fixed_shape(declared, "A constant"))
        size = elements * _kept(declared, self.numerics, wide).itemsize
        fits = size <= self._left or self._key(source, wide) in self._tensors
        if fits or not _in_slices(source):
            return self.tensor(source, wide=wide)
        return PackedWeight(source, self.numerics, self.device, wide)

    def _key(self, source: Source, wide: bool) -> Key:
        halved = self.numerics.held(_type(source).dtype) == torch.float16
        return (_digest(source), wide and halved)


def _digest(source: Source) -> bytes:
    """Return what tells two sources of one model apart; equal digests mean equal values."""
    if isinstance(source, Expression):
        return source.key
    if source.blob is not None:
        file, offset = source.blob
        return repr(("blob", id(file), offset, str(source.type))).encode()
    value = source.value()
    plain = not isinstance(value, np.ndarray) or value.dtype == object
    content = repr(value).encode() if plain else np.asarray(value).tobytes()
    return hashlib.sha256(repr(str(source.type)).encode() + content).digest()
