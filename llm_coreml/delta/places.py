"""Where the parts of a program lie in its file: a place for each weight, and for what is between.

    for place in places(Path("out/model.pte")): print(place.start, place.stop, place.weights)

Two programs of one model have the same parts in the same order, mostly of the same sizes; which of
them differ is then a matter of comparing bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from llm_coreml.artifact import pte
from llm_coreml.artifact.packages import BACKEND, Packages

# Of a `weight.bin`, see `artifact.weight_file`.
_COUNT = struct.Struct("<I")
_METADATA = struct.Struct("<IIQQ")
_SENTINEL = 0xDEADBEEF
_ALIGNED = 64


@dataclass(frozen=True)
class Place:
    """Bytes of a file.

    Attributes:
        start: The first.
        stop: The one after the last.
        weights: Whether they are a weight's, and nothing else.
    """

    start: int
    stop: int
    weights: bool


def places(path: Path) -> list[Place]:
    """Return the parts of the `.pte` at `path`; together they are all of it, in order.

    Raises:
        ArtifactError: it cannot be read.
    """
    container = pte.read(path)
    packages = Packages(container)
    whole: set[int] = {0, path.stat().st_size}
    weights: dict[int, int] = {}
    for method in container.methods.values():
        for delegate in method.delegates:
            if delegate.backend != BACKEND:
                whole |= set(_ends(delegate.data))
                continue
            for name, content in packages.find(delegate).folder.files.items():
                start, stop = _ends(content)
                whole |= {start, stop}
                if name.endswith(".bin"):
                    weights |= {start + first: start + last for first, last in _weights(content)}
    borders = sorted({*whole, *weights, *weights.values()})
    return [Place(start, stop, weights.get(start) == stop) for start, stop in pairwise(borders)]


def _ends(view: memoryview) -> tuple[int, int]:
    """Return where a view begins and ends in the file that it maps."""
    if not len(view):
        return 0, 0
    begin, base = (
        np.frombuffer(each, np.uint8).ctypes.data for each in (view, memoryview(view.obj))
    )
    return begin - base, begin - base + len(view)


def _weights(data: memoryview) -> Iterator[tuple[int, int]]:
    """Yield where the data of each blob of a `weight.bin` begins and ends.

    It ends early where the file is none: what is not told apart is compared as a whole.
    """
    if len(data) < _ALIGNED:
        return
    (count,) = _COUNT.unpack_from(data)
    at = _ALIGNED
    for _ in range(count):
        if at + _ALIGNED > len(data):
            return
        mark, _, size, start = _METADATA.unpack_from(data, at)
        if mark != _SENTINEL or start < at or start + size > len(data):
            return
        if size:
            yield start, start + size
        at = -(-(start + size) // _ALIGNED) * _ALIGNED
