"""How an artifact is to read a text: calls of every length, from the first position to the last.

    plan = plan_passes((1, 8, 64, 512), context=1024)
    plan.unrounded[0]   # 120 tokens (padded to 512), 64, 8, 1, 1, 1 from position 0
    plan.unrounded[1]   # 1, 1, 1, 3 (padded to 8), 15 (padded to 64) up to position 1023; it again
    plan.declared       # the same without the 512

A runner pads what is no length, and may do so where the pads lie beyond the context. So a call of
each length has fewer tokens than that; those up to 128 are made without pads, too.

Without rounding, where the question is what the program computes, every length is read. As the
program declares its types, the question is how well numbers of so many bits carry it: a row is
rounded alike whatever is computed beside it, so that long calls would take time and show nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# The second reads what the first has written. Each is a call: a longer decoding costs time on a
# large model, and shows nothing more.
_DECODED = 2
# Longer calls are made once, without rounding, from the beginning, and padded.
_LONG = 128
# From one length of a range that is read to the next.
_STEP = 8
# So much of a text is read before it may be said to be one.
_NATURAL = 256


@dataclass(frozen=True)
class Call:
    """Tokens that are given together.

    Attributes:
        first: Which of the pass's tokens is the first.
        count: How many they are; the artifact pads them to a length.
    """

    first: int
    count: int

    @property
    def end(self) -> int:
        """Which of the pass's tokens comes next."""
        return self.first + self.count


@dataclass(frozen=True)
class Pass:
    """One reading of the text.

    Attributes:
        start: Position of the first token; before it lies what the text holds there.
        calls: What to feed.
    """

    start: int
    calls: tuple[Call, ...]

    @property
    def count(self) -> int:
        """Tokens of the text that are read."""
        return max(call.end for call in self.calls)


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
        lengths: Chunks that the artifact accepts; or one, to which it pads.
        context: Positions of its cache.
    """
    usual = [length for length in lengths if length <= _LONG] or [min(lengths)]
    last = _up_to_the_end(usual, context)
    unrounded = (*_from_the_beginning(lengths, context), last)
    declared = (*_from_the_beginning(usual, context), last)
    longest = max(part.count for part in unrounded)
    return Plan(unrounded, declared, min(context, max(longest, _NATURAL)))


def sampled(first: int, last: int) -> tuple[int, ...]:
    """Return some lengths of a range, both ends among them, each a few times the one before."""
    found = [first]
    while found[-1] * _STEP < last:
        found.append(found[-1] * _STEP)
    return (*found, last)


def padded_count(length: int, lengths: Sequence[int]) -> int:
    """Return a number of tokens that is padded to `length`: about an eighth of those that are."""
    shorter = max((other for other in lengths if other < length), default=0)
    count = length - 7 * (length - shorter) // 8
    # Tokens that are repeated as a whole would end with the last one, as right pads do.
    while count < length and length % count == 0:
        count += 1
    return count


def one_after_the_other(start: int, counts: Sequence[int]) -> Pass:
    """Return the pass whose calls have so many tokens."""
    ends = accumulate(counts)
    return Pass(
        start, tuple(Call(end - count, count) for end, count in zip(ends, counts, strict=True))
    )


def _from_the_beginning(lengths: Sequence[int], context: int) -> tuple[Pass, ...]:
    """Return passes that read every length, the longest first."""
    counts = [length if length <= _LONG else padded_count(length, lengths) for length in lengths]
    left = sorted(counts, reverse=True)
    passes = []
    while left:
        # Not all of them need fit the context together.
        descending = _fitting(left, context)
        decoded = [1] * min(_DECODED, context - sum(descending))
        passes.append(one_after_the_other(0, [*descending, *decoded]))
        left = [count for count in left if count not in descending]
    return tuple(passes)


def _up_to_the_end(lengths: Sequence[int], context: int) -> Pass:
    """Return the pass that decodes, reads every length with pads and ends with the context."""
    ascending = _fitting([padded_count(length, lengths) for length in sorted(lengths)], context)
    decoded = [1] * min(_DECODED, context - sum(ascending))
    count = sum(ascending) + len(decoded)
    part = one_after_the_other(context - count, [*decoded, *ascending])
    if ascending[-1] == 1:
        return part
    # The last position once more, by itself: a runner that goes back writes over what is there.
    return Pass(part.start, (*part.calls, Call(count - 1, 1)))


def _fitting(counts: Sequence[int], limit: int) -> list[int]:
    parts: list[int] = []
    for count in counts:
        if sum(parts) + count <= limit:
            parts.append(count)
    return parts
