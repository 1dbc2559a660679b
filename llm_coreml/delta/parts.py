"""The bytes of a file as parts: some of another file's, some changed ones, some new.

    parts = compare(base, places_of_base, other, places_of_other)
    for piece in changes(base, other, parts): ...          # what `build` needs beside the base
    for piece in build(base, parts, read): ...             # the other file again

A part of the same size that differs is written as the exclusive or of both: where a fine-tune has
left most codes as they were, that is zeros for the most part, which compress to nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from llm_coreml.delta.places import Place

How = Literal["copy", "change", "new"]
# Bytes at a time.
_PIECE = 1 << 20


@dataclass(frozen=True)
class Part:
    """A run of bytes of a file that is made.

    Attributes:
        how: Taken from the base, changed from it, or new.
        bytes: How many.
        start: Where they begin in the base; 0 of what is new.
    """

    how: How
    bytes: int
    start: int = 0


def compare(
    base: memoryview, of_base: Sequence[Place], other: memoryview, of_other: Sequence[Place]
) -> list[Part]:
    """Return of what in `base` the file `other` can be made; the parts are those of `of_other`.

    What has no equal is held against the next part of the same size, in the order of both files.
    """
    equal: dict[bytes, Place] = {}
    sized: defaultdict[int, list[Place]] = defaultdict(list)
    for place in of_base:
        equal.setdefault(_digest(base[place.start : place.stop]), place)
        sized[place.stop - place.start].append(place)
    found, passed = [], 0
    for place in of_other:
        content, size = other[place.start : place.stop], place.stop - place.start
        same = _equal(base, content, passed, equal)
        if same is not None:
            found.append(Part("copy", size, same))
            passed = max(passed, same + size)
            continue
        like = next((each for each in sized[size] if each.start >= passed), None)
        if like is None or like.weights != place.weights:
            found.append(Part("new", size))
        else:
            found.append(Part("change", size, like.start))
            passed = like.stop
    return found


def _equal(
    base: memoryview, content: memoryview, passed: int, places: Mapping[bytes, Place]
) -> int | None:
    """Return where `base` holds the same bytes, best of all from `passed` on; None if nowhere."""
    if base[passed : passed + len(content)] == content:
        return passed
    found = places.get(_digest(content))
    same = found is not None and base[found.start : found.stop] == content
    return found.start if found is not None and same else None


def merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the same with runs that follow each other as one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        goes_on = last is not None and last.how == part.how
        if last and goes_on and (part.how == "new" or last.start + last.bytes == part.start):
            found[-1] = Part(last.how, last.bytes + part.bytes, last.start)
        else:
            found.append(part)
    return tuple(found)


def changes(base: memoryview, other: memoryview, parts: Sequence[Part]) -> Iterator[bytes]:
    """Yield what has to be kept of `other`, in the order in which `build` asks for it."""
    at = 0
    for part in parts:
        for first, last in _pieces(part.bytes if part.how != "copy" else 0):
            piece = other[at + first : at + last]
            if part.how == "change":
                yield _between(base[part.start + first : part.start + last], piece)
            else:
                yield bytes(piece)
        at += part.bytes


def build(
    base: memoryview, parts: Sequence[Part], read: Callable[[int], bytes]
) -> Iterator[bytes | memoryview]:
    """Yield a file's bytes.

    Args:
        base: The other file; it reaches as far as the parts say.
        parts: What is made of it.
        read: Gives as many of the bytes that `changes` has kept as it is asked for.
    """
    for part in parts:
        for first, last in _pieces(part.bytes):
            piece = base[part.start + first : part.start + last]
            if part.how == "copy":
                yield piece
            else:
                kept = read(last - first)
                yield kept if part.how == "new" else _between(piece, kept)


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, size, _PIECE):
        yield first, min(first + _PIECE, size)


def _between(first: bytes | memoryview, second: bytes | memoryview) -> bytes:
    mine, yours = (np.frombuffer(each, np.uint8) for each in (first, second))
    return (mine ^ yours).tobytes()


def _digest(data: memoryview) -> bytes:
    return xxhash.xxh3_128(data).digest()
