"""What an artifact is to read: every length, two orders, the first position and the last."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llm_coreml.lower.padded import padded_length
from llm_coreml.verify.passes import Call, Pass, one_after_the_other, plan_passes


def test_every_length_is_read_from_the_first_position_and_up_to_the_last() -> None:
    plan = plan_passes((1, 8, 64, 512), 1024)
    late = one_after_the_other(1024 - 21, [1, 1, 1, 3, 15])
    # The last position is read once with pads behind it, and once by itself.
    last = Pass(late.start, (*late.calls, Call(20, 1)))
    assert plan.unrounded == (one_after_the_other(0, [120, 64, 8, 1, 1, 1]), last)
    # How a row is rounded does not depend on those beside it.
    assert plan.declared == (one_after_the_other(0, [64, 8, 1, 1, 1]), last)
    assert plan.start == 1003 and plan.tokens == 256


@pytest.mark.parametrize(
    ("lengths", "context"),
    [
        ((1,), 32),
        ((1, 8), 9),
        ((1, 8), 8),
        ((1, 200), 256),
        ((1, 3), 2048),
        ((1, 2), 32),
        ((1, 8, 64, 128, 512), 1024),
    ],
)
def test_all_that_is_read_fits_the_context_and_ends_with_it(
    lengths: tuple[int, ...], context: int
) -> None:
    plan = plan_passes(lengths, context)
    for passes in (plan.unrounded, plan.declared):
        assert {part.start for part in passes} <= {0, plan.start}
        assert max(part.start + part.count for part in passes) == context
        for part in passes:
            assert part.start + part.count <= context
            # Nothing is left out, and what is read again has been read.
            ends = [0, *(call.end for call in part.calls)]
            assert all(call.first <= end for call, end in zip(part.calls, ends, strict=False))
    calls = [call for part in plan.unrounded for call in part.calls]
    assert {padded_length(call.count, lengths) for call in calls} == set(lengths)
    # With pads and without; long ones with pads, which is what a stock runner makes of a prompt.
    padded = {padded_length(call.count, lengths) for call in calls if call.count not in lengths}
    assert padded == {length for before, length in pairwise(lengths) if length > before + 1}
    assert {length for length in lengths if length <= 128} <= {call.count for call in calls}
    # A few tokens, again and again, would be no text.
    assert min(context, 256) <= plan.tokens <= context


@pytest.mark.parametrize("context", [32, 1024])
def test_pads_reach_beyond_the_context(context: int) -> None:
    lengths = (1, 8, 24)
    plan = plan_passes(lengths, context)
    for passes in (plan.unrounded, plan.declared):
        ends = [
            part.start + call.first + padded_length(call.count, lengths)
            for part in passes
            for call in part.calls
        ]
        assert max(ends) > context


def test_lengths_that_do_not_fit_the_context_together_are_read_apart() -> None:
    plan = plan_passes((1, 16, 24, 32), 40)
    counts = [[call.count for call in part.calls] for part in plan.unrounded if part.start == 0]
    assert counts == [[32, 1, 1, 1], [24, 16]]
