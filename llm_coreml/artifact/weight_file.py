"""Reader of `weight.bin`, the file in which Core ML keeps a model's large constants.

A header of 64 bytes counts the blobs; each blob has 64 bytes of metadata (mark, element type, size
and place of its data) to which the program's offsets point. Elements narrower than a byte are
packed from the least significant bit on, across byte borders.

    array = WeightFile(view, "weight.bin").read(64, "int4", 4096)
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from llm_coreml.artifact.dtypes import DTYPES, DType
from llm_coreml.errors import ArtifactError

_HEADER = struct.Struct("<II")
_HEADER_SIZE = 64
_METADATA = struct.Struct("<IIQQQ")
_METADATA_SIZE = 64
_SENTINEL = 0xDEADBEEF
_VERSION = 2
# Elements that are unpacked at a time; a multiple of 8.
_CHUNK = 1 << 18

# Numbers of the element types inside weight.bin; they differ from those in MIL.proto.
_BLOB_TYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}


@dataclass(frozen=True)
class WeightFile:
    """A `weight.bin` in memory.

    Attributes:
        data: the file's bytes.
        name: what errors call it.
    """

    data: memoryview
    name: str

    def __post_init__(self) -> None:
        if len(self.data) < _HEADER_SIZE:
            raise ArtifactError(
                f"{self.name} has {len(self.data)} bytes; its header alone takes {_HEADER_SIZE}."
            )
        version = _HEADER.unpack_from(self.data)[1]
        if version != _VERSION:
            raise ArtifactError(
                f"{self.name} has version {version} of the weight format; only {_VERSION} is known."
            )

    def read(self, offset: int, dtype: str, count: int, part: slice = slice(None)) -> np.ndarray:
        """Return the blob whose metadata is at `offset`, or a part of its elements.

        Args:
            offset: where the program says that the blob's metadata is.
            dtype: the element type that the program declares.
            count: the number of elements that the program declares.
            part: the elements to return; it starts at a whole byte.

        Returns:
            One-dimensional array of the elements; a view into the file where the type allows it,
            otherwise the unpacked elements, one per byte.

        Raises:
            ArtifactError: the metadata is absent or contradicts the program, or the data is cut.
        """
        where = f"The blob at offset {offset} of {self.name}"
        if offset < 0 or offset + _METADATA_SIZE > len(self.data):
            raise ArtifactError(f"{where} lies outside of the file's {len(self.data)} bytes.")
        sentinel, code, size, start, padding = _METADATA.unpack_from(self.data, offset)
        if sentinel != _SENTINEL:
            raise ArtifactError(f"{where} does not start with the mark of a weight.")
        if _BLOB_TYPES.get(code) != dtype:
            raise ArtifactError(
                f"{where} holds {_BLOB_TYPES.get(code, f'type {code}')}; "
                f"the program declares {dtype}."
            )
        if start + size > len(self.data):
            raise ArtifactError(
                f"{where} ends at byte {start + size}; the file has {len(self.data)}. "
                "The weights are truncated."
            )
        row = DTYPES[dtype]
        bits = size * 8 - (padding if row.bits < 8 else 0)
        if bits != count * row.bits:
            raise ArtifactError(
                f"{where} holds {bits} bits; the program declares {count} elements of {dtype}."
            )
        first, last, _ = part.indices(count)
        begin = start + first * row.bits // 8
        return unpack_elements(self.data[begin : start + size], row, last - first)


def unpack_elements(data: memoryview | bytes, row: DType, count: int) -> np.ndarray:
    """Return `count` elements of type `row` from packed little-endian bytes.

    Args:
        data: at least `ceil(count * row.bits / 8)` bytes.
        row: the element type.
        count: how many elements to return.

    Returns:
        One-dimensional array of type `row.array`; a read-only view where `row.bits >= 8`.
    """
    if row.bits >= 8:
        return np.frombuffer(data, row.array, count)
    packed = np.frombuffer(data, np.uint8, math.ceil(count * row.bits / 8))
    split = _split_bytes if row.bits in (1, 2, 4) else _split_groups
    result = np.empty(count, row.array)
    # Piece by piece, so that what is computed in between stays small; eight elements fill bytes.
    for start in range(0, count, _CHUNK):
        piece = packed[start * row.bits // 8 : (start + _CHUNK) * row.bits // 8]
        elements = split(piece, row.bits)[: count - start]
        if row.signed:
            # Turned over and taken off again, the top bit counts as a negative number.
            elements = (elements ^ (1 << row.bits - 1)) - np.uint8(1 << row.bits - 1)
        result[start : start + _CHUNK] = elements.view(row.array)
    return result


def _split_bytes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpack 1, 2 or 4 bits: each byte is spread over a word, in halves of halves."""
    per_byte = 8 // bits
    words = packed.astype(f"<u{per_byte}")
    part, apart = 8, 8 * per_byte
    while part > bits:
        part, apart = part // 2, apart // 2
        words |= words << words.dtype.type(apart - part)
        words &= words.dtype.type(
            sum((1 << part) - 1 << at for at in range(0, 8 * per_byte, apart))
        )
    return words.view(np.uint8)


def _split_groups(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpack 3 or 6 bits: `bits` bytes hold eight elements, in one 64-bit word."""
    groups = math.ceil(packed.size / bits)
    padded = np.zeros(groups * bits, np.uint8)
    padded[: packed.size] = packed
    words = np.zeros((groups, 8), np.uint8)
    words[:, :bits] = padded.reshape(groups, bits)
    word = words.view("<u8").reshape(groups)
    result = np.empty((groups, 8), np.uint8)
    for place in range(8):
        result[:, place] = (word >> np.uint64(place * bits)) & np.uint64((1 << bits) - 1)
    return result.reshape(-1)
