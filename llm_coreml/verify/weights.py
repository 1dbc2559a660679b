"""Does a program hold exactly the weights of the model that it was made from?

Every parameter and table of the eager decoder must be among the program's constants, bit by bit
once both are expanded, and every array of fractions in the program must be one of them, or zero.
Only what is all ones or all zeros may be absent: a compiler drops it. Logits cannot show this: a
changed row of the token table is seen by nobody who does not read that token. Contents are compared
by their hashes, which are taken a few rows at a time, where the rows are expanded for use anyway.

    digests = Digests()
    digests.add("lm_head.weight", rows)            # as they come by
    compared = check_weights(constants, digests.contents(decoder))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import torch
import xxhash

from llm_coreml.decoder import Decoder
from llm_coreml.errors import VerificationError
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.reference.program.constants import PackedWeight

# Elements at a time: few enough to stay near the core.
_HASHED = 1 << 16


@dataclass(frozen=True)
class Content:
    """What tells tensors apart.

    Attributes:
        shape: its sizes, but for those that are one.
        digest: hash of the values as fp32.
        neutral: whether all values are zero, or all are one.
        fractions: whether the values are floating-point numbers.
    """

    shape: tuple[int, ...]
    digest: bytes
    neutral: bool = field(compare=False)
    fractions: bool = field(compare=False)


class Digest:
    """The content of a tensor whose rows come one after the other."""

    def __init__(self) -> None:
        # Of 128 bits, quick: it guards against mistakes, not against people.
        self._hash = xxhash.xxh3_128()
        self._neutral = {0.0, 1.0}
        self.rows = 0

    def add(self, piece: torch.Tensor) -> None:
        """Take the next rows, as fp32 or another type."""
        for part in torch.split(piece.reshape(-1), _HASHED):
            self._neutral = {number for number in self._neutral if bool((part == number).all())}
            # Adding zero makes one of the two zeros, which compare equal.
            self._hash.update((part + 0.0).numpy().data)
        self.rows += len(piece) if piece.ndim else 1

    def content(self, shape: tuple[int, ...], *, fractions: bool = True) -> Content:
        """Return the content of what has come, a tensor of that shape.

        Axes of one element do not count: a compiler that exchanges a product or a sum with a
        transposition gives a number, or a row of them, as many as it needs.
        """
        sizes = tuple(size for size in shape if size != 1) or (1,)
        return Content(sizes, self._hash.digest(), bool(self._neutral), fractions)


class Digests:
    """The contents of a decoder's tensors, of which many come by while it reads.

    Args:
        cuts: In which ways a parameter may lie in parts in the program, by its name: where the
            parts begin, and the last one ends.
    """

    def __init__(self, cuts: Mapping[str, Sequence[Sequence[int]]] = MappingProxyType({})) -> None:
        self._found: dict[str, Digest] = {}
        self._cuts = cuts
        self._parts: dict[str, list[list[Digest]]] = {}

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Take a parameter's next rows, by its name."""
        whole = self._found.setdefault(name, Digest())
        if name in self._cuts:
            self._add_parts(name, whole.rows, rows)
        whole.add(rows)

    def _add_parts(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Take rows from `first` on for the parts that they are in."""
        empty = [[Digest() for _ in bounds[1:]] for bounds in self._cuts[name]]
        ways = self._parts.setdefault(name, empty)
        for bounds, digests in zip(self._cuts[name], ways, strict=True):
            for (start, stop), digest in zip(pairwise(bounds), digests, strict=True):
                part = rows[max(start - first, 0) : max(stop - first, 0)]
                if len(part):
                    digest.add(part)

    def parts(self, decoder: Decoder) -> dict[str, list[list[Content]]]:
        """Return the contents of the parts of each parameter that may be cut, for every way.

        To be called after `contents`, which has taken all rows.
        """
        shapes = {name: value.shape for name, value in _held(decoder)}
        return {
            name: [
                [digest.content((digest.rows, *shapes[name][1:])) for digest in digests]
                for digests in ways
            ]
            for name, ways in self._parts.items()
        }

    def contents(self, decoder: Decoder) -> dict[str, Content]:
        """Return the content of all that the decoder computes with, by name."""
        contents = {}
        for name, value in _held(decoder):
            found = self._found.get(name)
            if found is None or found.rows != len(value):
                self._found.pop(name, None)
                self._parts.pop(name, None)
                for rows in dense_rows(value):
                    self.add(name, rows)
            contents[name] = self._found[name].content(value.shape)
        return contents


def check_weights(
    constants: Iterable[tuple[str, torch.Tensor | PackedWeight]],
    expected: Mapping[str, Content],
    known_contents: Mapping[PackedWeight, Content] = MappingProxyType({}),
    parts: Mapping[str, Sequence[Sequence[Content]]] = MappingProxyType({}),
) -> int:
    """Hold a program's constants against the decoder's parameters and tables.

    Args:
        constants: Names and values of a program that was loaded to run without rounding.
        expected: The contents of the quantized decoder that the program was made from.
        known_contents: Of constants that have been expanded already.
        parts: Of the parts in which a tensor may be there instead, for every way to cut it.

    Returns:
        How many tensors of the decoder were compared.

    Raises:
        VerificationError: one is missing, or the program holds numbers that the decoder has not.
    """
    found: dict[Content, str] = {}
    for name, value in constants:
        if isinstance(value, PackedWeight):
            found[known_contents.get(value) or _program_content(value)] = name
        # A number of its own is a part of the computation, which the logits show.
        elif value.ndim:
            found[_program_content(value)] = name
    cut = {part for ways in parts.values() for way in ways for part in way}
    known = {*expected.values(), *cut}
    strange = {
        content: name
        for content, name in found.items()
        if content.fractions and not content.neutral and content not in known
    }
    for name, content in expected.items():
        # A product with ones or a sum with zeros is left out of a program.
        there = any(
            all(part in found or part.neutral for part in way) for way in parts.get(name, ())
        )
        if content not in found and not content.neutral and not there:
            raise VerificationError(_missing(name, content, strange))
    for content, name in strange.items():
        raise VerificationError(
            f"The program computes with '{name}' {list(content.shape)}, which is none of the "
            f"model's weights. {_NEXT}"
        )
    return len(expected)


_NEXT = (
    "The file is not the model that was lowered. Export again, and report the model if that fails "
    "too."
)


def _missing(name: str, content: Content, unknown: dict[Content, str]) -> str:
    """Say that a weight is missing, and what the program may have in its place."""
    similar = next((other for known, other in unknown.items() if known.shape == content.shape), "")
    instead = f"; '{similar}' of that shape holds other values" if similar else ""
    return (
        f"The weight '{name}' {list(content.shape)} is not in the program, bit by bit{instead}. "
        f"{_NEXT}"
    )


def _held(decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the decoder computes with; its states are what it remembers."""
    yield from decoder.named_parameters()
    remembered = {id(buffer) for state in decoder.states.values() for buffer in state.buffers()}
    for name, buffer in decoder.named_buffers():
        if id(buffer) not in remembered:
            yield name, buffer


def _program_content(value: torch.Tensor | PackedWeight) -> Content:
    if isinstance(value, PackedWeight):
        return _content(value.shape, (rows for _, _, rows in value.slices()))
    return _content(value.shape, dense_rows(value), fractions=value.is_floating_point())


def _content(
    shape: tuple[int, ...], pieces: Iterable[torch.Tensor], *, fractions: bool = True
) -> Content:
    digest = Digest()
    for piece in pieces:
        digest.add(piece)
    return digest.content(shape, fractions=fractions)
