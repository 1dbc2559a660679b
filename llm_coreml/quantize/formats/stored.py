"""Quantized matrices as a Core ML program stores them, back as the tensors that were lowered.

    for stored in stored_matrices(Path("out/model.pte")):
        weight = stored.tensor()

Nothing of a program is trusted: sizes that do not divide are refused before a matrix is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llm_coreml.artifact import pte
from llm_coreml.artifact.dtypes import DTYPES, DType
from llm_coreml.artifact.mil import (
    Binding,
    Constant,
    Function,
    Operation,
    TensorType,
    fixed_shape,
)
from llm_coreml.artifact.packages import BACKEND, Packages
from llm_coreml.errors import ArtifactError, UnsupportedError
from llm_coreml.quantize.formats.schemes import ZeroPoint
from llm_coreml.quantize.formats.tensors import codebook_tensor, integer_tensor, lookup_tensor

_SCALED, _LOOKED_UP = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"
# The forms for systems before iOS18.
_OLD = ("constexpr_affine_dequantize",)
_INTEGERS = ("int4", "int8")


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A matrix in a program's file, not yet decoded.

    Attributes:
        name: Of the operation that expands it.
        codes: Integers, `[rows, columns]`, or places in tables, `[rows / width, columns]`.
        tables: `[row_groups, column_groups, entries, width]`; None where codes are numbers.
        scale: `[row_blocks, column_blocks]`; None is one.
        offset: As `scale`; None is zero.
    """

    name: str
    codes: Constant
    tables: Constant | None
    scale: Constant | None
    offset: Constant | None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _type(self.codes)[0].bits

    @property
    def stored_bits(self) -> int:
        """Bits that codes, scales and tables take; offsets are not counted."""
        parts = [each for each in (self.codes, self.tables, self.scale) if each is not None]
        return sum(kind.bits * math.prod(shape) for kind, shape in map(_type, parts))

    @property
    def zero_point(self) -> ZeroPoint:
        """Of which kind the offsets are."""
        if self.offset is None:
            return "none"
        return "float" if _type(self.offset)[0].is_float else "int"

    def tensor(self) -> torch.Tensor:
        """Return the matrix as `formats.tensors` makes it.

        Raises:
            ArtifactError: the file contradicts itself.
        """
        codes = self._part(self.codes)
        scale = None if self.scale is None else self._part(self.scale).to(torch.float32)
        offset = None if self.offset is None else self._part(self.offset)
        if offset is not None and offset.is_floating_point():
            offset = offset.to(torch.float32)
        if self.tables is None:
            assert scale is not None
            self._check(codes.shape, scale.shape, offset)
            return integer_tensor(codes, scale, offset, self.bits)
        tables = self._tables()
        rows = codes.shape[0] * tables.shape[3]
        self._check((rows, codes.shape[1]), tables.shape[:2], None)
        if tables.shape[2] != 2**self.bits:
            raise self._damaged()
        if scale is not None:
            self._check((rows, codes.shape[1]), scale.shape, offset)
            return lookup_tensor(codes, tables, self.bits, scale, offset)
        if tables.shape[3] > 1:
            return lookup_tensor(codes, tables, self.bits, None, None)
        return codebook_tensor(codes, tables.squeeze(3), self.bits)

    def _part(self, constant: Constant) -> torch.Tensor:
        """Return a constant `[rows, columns]`, without the axes of one that convolutions have."""
        value = _array(constant)
        if value.ndim < 2 or math.prod(value.shape[2:]) != 1:
            raise self._damaged()
        # A copy: what is mapped cannot be written to, and torch has no such tensors.
        return torch.from_numpy(value.reshape(value.shape[:2]).copy())

    def _tables(self) -> torch.Tensor:
        assert self.tables is not None
        value = _array(self.tables)
        if value.ndim < 4 or math.prod(value.shape[2:-2]) != 1:
            raise self._damaged()
        found = torch.from_numpy(value.reshape(*value.shape[:2], *value.shape[-2:]).copy())
        return found.to(torch.float32) if found.is_floating_point() else found

    def _check(
        self, shape: tuple[int, ...], blocks: tuple[int, ...], offset: torch.Tensor | None
    ) -> None:
        """Refuse blocks that do not divide a matrix, and offsets that are not those of scales."""
        divided = all(block and not size % block for size, block in zip(shape, blocks, strict=True))
        if not divided or (offset is not None and offset.shape != blocks):
            raise self._damaged()

    def _damaged(self) -> ArtifactError:
        return ArtifactError(f"'{self.name}' is no matrix that a program could expand.")


def stored_matrices(program: Path) -> Iterator[StoredMatrix]:
    """Yield the quantized matrices of a `.pte`, each one once, in the order of their use.

    Raises:
        ArtifactError: the file cannot be read, or holds models compiled for a device.
        UnsupportedError: it has the form for systems before iOS18.
    """
    container = pte.read(program)
    packages = Packages(container)
    seen: set[tuple[int, int]] = set()
    for method in container.methods.values():
        for delegate in method.delegates:
            if delegate.backend != BACKEND:
                continue
            lowered = packages.open(delegate)
            for stored in _in_function(lowered.package.model.functions[lowered.function]):
                file, at = stored.codes.blob or (stored, 0)
                if (id(file), at) not in seen:
                    seen.add((id(file), at))
                    yield stored


def _in_function(function: Function) -> Iterator[StoredMatrix]:
    made = {item.name: each for each in function.operations for item in each.outputs}
    scaled = {name for each in function.operations if each.type == _SCALED for name in each.names()}
    for operation in function.operations:
        old = operation.type == _LOOKED_UP and "indices" not in operation.inputs
        if operation.type in _OLD or old:
            raise UnsupportedError(
                "the program is for systems before iOS18, which keep codes in another form; "
                "export the base with --minimum-os iOS18"
            )
        if operation.type == _SCALED:
            yield from _scaled(operation, made)
        elif operation.type == _LOOKED_UP and operation.outputs[0].name not in scaled:
            parts = [_constant(operation, key, made) for key in ("indices", "lut")]
            if parts[0] is not None:
                yield StoredMatrix(operation.name, parts[0], parts[1], None, None)


def _scaled(operation: Operation, made: Mapping[str, Operation]) -> Iterator[StoredMatrix]:
    scale, offset = (_constant(operation, key, made) for key in ("scale", "offset"))
    data = _binding(operation, "data")
    inner = made.get(data) if isinstance(data, str) else None
    if inner is not None and inner.type == _LOOKED_UP:
        codes, tables = (_constant(inner, key, made) for key in ("indices", "lut"))
    else:
        codes, tables = _constant(operation, "data", made), None
    if codes is None or scale is None:
        return
    if tables is not None or _type(codes)[0].name in _INTEGERS:
        yield StoredMatrix(operation.name, codes, tables, scale, offset)


def _binding(operation: Operation, key: str) -> Binding | None:
    bound = operation.inputs.get(key, ())
    return bound[0] if len(bound) == 1 else None


def _constant(operation: Operation, key: str, made: Mapping[str, Operation]) -> Constant | None:
    """Return what is bound to a parameter, if it is a plain constant."""
    bound = _binding(operation, key)
    if isinstance(bound, str):
        found = made.get(bound)
        return found.attributes.get("val") if found is not None else None
    return bound


def _type(constant: Constant) -> tuple[DType, tuple[int, ...]]:
    if not isinstance(constant.type, TensorType):
        raise ArtifactError(f"A {constant.type} is used as a matrix.")
    return DTYPES[constant.type.dtype], fixed_shape(constant.type, "A matrix")


def _array(constant: Constant) -> np.ndarray:
    _type(constant)
    value = constant.value()
    assert isinstance(value, np.ndarray)
    return value
