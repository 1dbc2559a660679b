"""A Core ML model as plain data: features, functions, operations, types and constants.

`milproto.parse` makes these from the protobuf messages of a `.mlpackage`; they are frozen and hold
no protobuf object. Constants are decoded when they are asked for, so a large weight need not exist
unpacked before it is used.

    for operation in model.functions["main"].operations:
        print(operation.type, operation.name, [str(output.type) for output in operation.outputs])
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm_coreml.artifact.weight_file import WeightFile
from llm_coreml.errors import ArtifactError


@dataclass(frozen=True)
class TensorType:
    """Element type by MIL's name, and sizes; None is a size that only a call decides."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True)
class ListType:
    """A list or tuple of values."""

    length: int | None

    def __str__(self) -> str:
        return f"list[{self.length}]"


@dataclass(frozen=True)
class StateType:
    """A tensor that lives across calls."""

    wrapped: TensorType

    def __str__(self) -> str:
        return f"state<{self.wrapped}>"


ValueType = TensorType | ListType | StateType


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that the file holds.

    Attributes:
        type: its declared type.
        content: array, string or tuple; None where the value lies in a weight file.
        blob: weight file and offset of a value that lies there.
    """

    type: ValueType
    content: np.ndarray | str | tuple[Any, ...] | None = field(repr=False, default=None)
    blob: tuple[WeightFile, int] | None = field(repr=False, default=None)

    def value(self) -> np.ndarray | str | tuple[Any, ...]:
        """Return the decoded value; an array has the declared shape.

        Raises:
            ArtifactError: the weight file contradicts the declaration.
        """
        if self.blob is None:
            assert self.content is not None
            return self.content
        assert isinstance(self.type, TensorType)
        shape = fixed_shape(self.type, "A constant")
        file, offset = self.blob
        return file.read(offset, self.type.dtype, math.prod(shape)).reshape(shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return what `value()[start:stop]` is, without decoding the rest.

        Args:
            start: first row; a multiple of 8, so that it begins with a whole byte.
            stop: the row after the last one.

        Raises:
            ArtifactError: as `value`.
        """
        if self.blob is None:
            value = self.value()
            assert isinstance(value, np.ndarray)
            return value[start:stop]
        assert isinstance(self.type, TensorType)
        shape = fixed_shape(self.type, "A constant")
        file, offset = self.blob
        row = math.prod(shape[1:])
        part = file.read(offset, self.type.dtype, math.prod(shape), slice(start * row, stop * row))
        return part.reshape(-1, *shape[1:])


Binding = str | Constant


@dataclass(frozen=True)
class NamedType:
    """A value's name and declared type."""

    name: str
    type: ValueType


@dataclass(frozen=True)
class Block:
    """What a branch or a loop runs; its inputs are what the loop carries."""

    inputs: tuple[NamedType, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Operation:
    """One operation: parameter name to what is bound to it, several bindings for a tuple."""

    type: str
    name: str
    inputs: dict[str, tuple[Binding, ...]]
    attributes: dict[str, Constant]
    outputs: tuple[NamedType, ...]
    blocks: tuple[Block, ...] = ()

    def names(self) -> Iterator[str]:
        """Yield the names that the inputs, here and in nested blocks, are bound to."""
        for bindings in self.inputs.values():
            yield from (binding for binding in bindings if isinstance(binding, str))
        for block in self.blocks:
            yield from block.outputs
            for operation in block.operations:
                yield from operation.names()


@dataclass(frozen=True)
class Function:
    """One function of the program, in the form for its newest opset."""

    name: str
    opset: str
    inputs: tuple[NamedType, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Feature:
    """An input, output or state as the model's interface describes it.

    Attributes:
        name: the feature's name.
        dtype: MIL's name of the element type.
        shape: default shape; may be empty for an output whose shape is not described.
        enumerated: the allowed shapes, or empty where the shape is fixed or given by `ranges`.
        ranges: (lowest, highest) per dimension, with None for no upper bound; empty if unused.
        optional: whether a caller may leave the input out.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    enumerated: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Interface:
    """The described features of one function."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]


@dataclass(frozen=True)
class Model:
    """A parsed `.mlpackage`."""

    specification_version: int
    functions: dict[str, Function]
    interfaces: dict[str, Interface]
    default_function: str


def fixed_shape(declared: TensorType, who: str) -> tuple[int, ...]:
    """Return the shape of `declared`, all of whose sizes must be known.

    Raises:
        ArtifactError: a size is unknown.
    """
    if any(size is None for size in declared.shape):
        raise ArtifactError(f"{who} has the type {declared}, whose size is not fixed.")
    return tuple(size for size in declared.shape if size is not None)
