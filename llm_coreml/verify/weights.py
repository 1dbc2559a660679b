"""Does a program hold exactly the weights of the model that it was made from?

Every parameter and table of the eager decoder must be among the program's constants, bit by bit
once both are expanded, and every array of fractions in the program must be one of them, or zero.
Only what is all ones or all zeros may be absent: a compiler drops it. Logits cannot show this: a
changed row of the token table is seen by nobody who does not read that token. Contents are compared
by their hashes, a few rows at a time.

    compared = check_weights(runner.constants(), decoder)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from llm_coreml.decoder import Decoder
from llm_coreml.errors import VerificationError
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.reference.program.constants import PackedWeight


@dataclass(frozen=True)
class _Content:
    """What tells tensors apart.

    Attributes:
        shape: its sizes.
        digest: hash of the values as fp32.
        neutral: whether all values are zero, or all are one.
        fractions: whether the values are floating-point numbers.
    """

    shape: tuple[int, ...]
    digest: bytes
    neutral: bool = field(compare=False)
    fractions: bool = field(compare=False)


def check_weights(
    constants: Iterable[tuple[str, torch.Tensor | PackedWeight]], decoder: Decoder
) -> int:
    """Hold a program's constants against the decoder's parameters and tables.

    Args:
        constants: Names and values of a program that was loaded to run without rounding.
        decoder: The quantized decoder that the program was made from.

    Returns:
        How many tensors of the decoder were compared.

    Raises:
        VerificationError: one is missing, or the program holds numbers that the decoder has not.
    """
    found: dict[_Content, str] = {}
    for name, value in constants:
        # A number of its own is a part of the computation, which the logits show.
        if isinstance(value, PackedWeight) or value.ndim:
            found[_program_content(value)] = name
    expected = {name: _content(value.shape, dense_rows(value)) for name, value in _held(decoder)}
    known = set(expected.values())
    strange = {
        content: name
        for content, name in found.items()
        if content.fractions and not content.neutral and content not in known
    }
    for name, content in expected.items():
        # A product with ones or a sum with zeros is left out of a program.
        if content not in found and not content.neutral:
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


def _missing(name: str, content: _Content, unknown: dict[_Content, str]) -> str:
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


def _program_content(value: torch.Tensor | PackedWeight) -> _Content:
    if isinstance(value, PackedWeight):
        return _content(value.shape, (rows for _, _, rows in value.slices()))
    return _content(value.shape, dense_rows(value), fractions=value.is_floating_point())


def _content(
    shape: tuple[int, ...], pieces: Iterable[torch.Tensor], *, fractions: bool = True
) -> _Content:
    digest, neutral = hashlib.sha256(), {0.0, 1.0}
    for piece in pieces:
        neutral = {number for number in neutral if bool((piece == number).all())}
        # Adding zero makes one of the two zeros, which compare equal.
        digest.update((piece + 0.0).contiguous().numpy().data)
    return _Content(tuple(shape), digest.digest(), bool(neutral), fractions)
