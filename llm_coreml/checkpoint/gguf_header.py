"""The header of a GGUF file: metadata, and which bytes hold which tensor.

Nothing in the file is trusted: every count and offset is held against the file's own length before
it is used, so a damaged header ends in one sentence and not in a long loop.

    header = read_header(path)
    header.metadata["general.architecture"]        # 'llama'
    header.tensors["blk.0.attn_q.weight"].shape    # (2048, 2048), outputs first
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from llm_coreml.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Types of metadata, as struct has them.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS = 4
# An array of a number for each layer is kept; one for each token is not.
_SHORT = 1024

Octets = np.ndarray[Any, np.dtype[np.uint8]]


@final
@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file.

    Attributes:
        kind: The number of its type.
        shape: Outputs first, as torch has it.
        offset: Of its first byte, from the beginning of the data.
    """

    kind: int
    shape: tuple[int, ...]
    offset: int


@final
@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        metadata: Numbers and strings by name; of an array how many `elements` it has, of a short
            one of numbers their `values`, and of one of strings how many bytes the `longest` takes.
        tensors: By name.
        start: Where the data begins.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    start: int


def read_header(path: Path, octets: Octets) -> Header:
    """Read the header of the file that `octets` maps.

    Raises:
        CheckpointError: it is no GGUF file of a known version, or is damaged.
    """
    reader = _Reader(octets)
    try:
        if bytes(octets[:4]) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        reader.at = 4
        version = reader.number("I")
        if version not in _VERSIONS:
            raise ValueError(f"it is of version {version}, and 2 and 3 are read")
        tensors, entries = reader.number("Q"), reader.number("Q")
        metadata = {}
        for _ in range(entries):
            name = reader.string()
            metadata[name] = reader.value(reader.number("I"))
        found = dict(reader.tensor() for _ in range(tensors))
        if len(found) != tensors:
            raise ValueError("two tensors have one name")
        unit = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(unit, int) or unit < 1:
            raise ValueError(f"its alignment is {unit!r}")
    except (ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is no whole GGUF file: {error}. Download it again."
        ) from error
    return Header(metadata, found, -(-reader.at // unit) * unit)


class _Reader:
    """Reads one value after the other; `struct.error` and ValueError tell of a damaged file."""

    def __init__(self, octets: Octets) -> None:
        self.octets = octets
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.octets) - self.at:
            raise ValueError(f"it ends after {len(self.octets)} bytes, inside its header")
        self.at += count
        return self.octets[self.at - count : self.at].tobytes()

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"it has metadata of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            size = struct.calcsize(f"<{_NUMBERS[inner]}")
            octets = self.take(count * size)
            if count <= _SHORT:
                values = struct.unpack(f"<{count}{_NUMBERS[inner]}", octets)
                return {"elements": count, "values": values}
        elif inner == _STRING:
            # Each takes a length of eight bytes at least, so the file's end bounds the loop.
            longest = 0
            for _ in range(count):
                longest = max(longest, len(self.take(self.number("Q"))))
            return {"elements": count, "longest": longest}
        else:
            raise ValueError(f"it has an array of type {inner}")
        return {"elements": count}

    def tensor(self) -> tuple[str, TensorInfo]:
        name, dimensions = self.string(), self.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"'{name}' has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, TensorInfo(self.number("I"), shape, self.number("Q"))
