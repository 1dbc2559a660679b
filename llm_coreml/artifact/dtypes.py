"""Core ML's element types: one row per type, and how each is held in numpy.

>>> by_code(10).name
'fp16'
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_coreml.errors import ArtifactError


@dataclass(frozen=True)
class DType:
    """One element type of an ML Program.

    Attributes:
        name: MIL's name, for instance `fp16`, `int4` or `bool`.
        code: number in the `DataType` enumeration of MIL.proto.
        bits: width of one element where it is stored packed.
        signed: whether a packed element carries a sign bit.
        array: numpy type that holds the unpacked elements.
    """

    name: str
    code: int
    bits: int
    signed: bool
    array: np.dtype[np.generic]

    @property
    def is_float(self) -> bool:
        """Whether the type is a floating one."""
        return self.array.kind == "f"


def _row(name: str, code: int, bits: int, signed: bool, array: str) -> DType:
    return DType(name, code, bits, signed, np.dtype(array))


_TABLE = (
    _row("bool", 1, 8, False, "bool"),
    _row("string", 2, 0, False, "O"),
    _row("fp16", 10, 16, True, "<f2"),
    _row("fp32", 11, 32, True, "<f4"),
    _row("fp64", 12, 64, True, "<f8"),
    _row("int8", 21, 8, True, "i1"),
    _row("int16", 22, 16, True, "<i2"),
    _row("int32", 23, 32, True, "<i4"),
    _row("int64", 24, 64, True, "<i8"),
    _row("int4", 25, 4, True, "i1"),
    _row("uint8", 31, 8, False, "u1"),
    _row("uint16", 32, 16, False, "<u2"),
    _row("uint32", 33, 32, False, "<u4"),
    _row("uint64", 34, 64, False, "<u8"),
    _row("uint4", 35, 4, False, "u1"),
    _row("uint2", 36, 2, False, "u1"),
    _row("uint1", 37, 1, False, "u1"),
    _row("uint6", 38, 6, False, "u1"),
    _row("uint3", 39, 3, False, "u1"),
)

DTYPES = {row.name: row for row in _TABLE}
_BY_CODE = {row.code: row for row in _TABLE}


def by_code(code: int) -> DType:
    """Return the type with MIL's enumeration number `code`.

    Raises:
        ArtifactError: the number belongs to no type that the reference knows.
    """
    found = _BY_CODE.get(code)
    if found is None:
        raise ArtifactError(f"The program uses the unknown Core ML data type number {code}.")
    return found
