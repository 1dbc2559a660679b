"""How an artifact is to read a text: calls of every length, from the first position to the last.

    plan = plan_passes((1, 8, 64, 512), context=1024)
    plan.unrounded      # 512, 64, 8, 1, 1, 1 from position 0; 1, 8, 64, 1, 1 up to position 1023
    plan.declared       # the same without the 512

Without rounding, where the question is what the program computes, every length is read. As the
program declares its types, the question is how well numbers of so many bits carry it: a row is
rounded alike whatever is computed beside it, so that long calls would take time and show nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The second reads what the first has written. Each is a call: a longer decoding costs time on a
# large model, and shows nothing more.
_DECODED = 2
# Longer calls are read once, without rounding, from the beginning.
_LONG = 128
# So much of a text is read before it may be said to be one.
_NATURAL = 512


@dataclass(frozen=True)
class Pass:
    """One reading of the text.

    Attributes:
        start: Position of the first token; before it lies what the text holds there.
        lengths: Chunks to feed.
    """

    start: int
    lengths: tuple[int, ...]

    @property
    def count(self) -> int:
        """Tokens read."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Plan:
    """What an artifact reads.

    Attributes:
        unrounded: Its passes when nothing is rounded.
        declared: Its passes when values are of the types that the program declares.
        tokens: How many tokens of text there are; positions beyond them hold the text again.
    """

    unrounded: tuple[Pass, ...]
    declared: tuple[Pass, ...]
    tokens: int

    @property
    def start(self) -> int:
        """Where the passes begin that do not begin at position 0."""
        return max(part.start for part in self.unrounded)


def plan_passes(lengths: Sequence[int], context: int) -> Plan:
    """Plan passes that read every length, in two orders, and the first and the last position.

    Args:
        lengths: Chunks that the artifact accepts, 1 among them.
        context: Positions of its cache.
    """
    usual = [length for length in lengths if length <= _LONG]
    ascending = _with_decoding(_fitting(sorted(usual), context), context)
    last = Pass(context - sum(ascending), ascending)
    unrounded = (*_from_the_beginning(lengths, context), last)
    declared = (*_from_the_beginning(usual, context), last)
    longest = max(part.count for part in unrounded)
    return Plan(unrounded, declared, min(context, max(longest, _NATURAL)))


def _from_the_beginning(lengths: Sequence[int], context: int) -> tuple[Pass, ...]:
    """Return passes that read every length, the longest first."""
    left = sorted(lengths, reverse=True)
    passes = []
    while left:
        # Not all of them need fit the context together.
        descending = _fitting(left, context)
        passes.append(Pass(0, _with_decoding(descending, context)))
        left = [length for length in left if length not in descending]
    return tuple(passes)


def _fitting(lengths: Sequence[int], limit: int) -> tuple[int, ...]:
    parts: list[int] = []
    for length in lengths:
        if sum(parts) + length <= limit:
            parts.append(length)
    return tuple(parts)


def _with_decoding(lengths: tuple[int, ...], limit: int) -> tuple[int, ...]:
    return (*lengths, *([1] * min(_DECODED, limit - sum(lengths))))
