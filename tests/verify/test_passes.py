"""What an artifact is to read: every length, two orders, the first position and the last."""

from __future__ import annotations

import pytest

from llm_coreml.verify.passes import Pass, plan_passes


def test_every_length_is_read_from_the_first_position_and_up_to_the_last() -> None:
    plan = plan_passes((1, 8, 64, 512), 1024)
    last = Pass(1024 - 75, (1, 8, 64, 1, 1))
    assert plan.unrounded == (Pass(0, (512, 64, 8, 1, 1, 1)), last)
    # How a row is rounded does not depend on those beside it.
    assert plan.declared == (Pass(0, (64, 8, 1, 1, 1)), last)
    assert plan.start == 949 and plan.tokens == 587


@pytest.mark.parametrize(
    ("lengths", "context"), [((1,), 32), ((1, 8), 9), ((1, 8), 8), ((1, 200), 256), ((1, 3), 2048)]
)
def test_all_that_is_read_fits_the_context_and_ends_with_it(
    lengths: tuple[int, ...], context: int
) -> None:
    plan = plan_passes(lengths, context)
    for passes in (plan.unrounded, plan.declared):
        assert {part.start for part in passes} <= {0, plan.start}
        assert max(part.start + part.count for part in passes) == context
        assert all(part.start + part.count <= context for part in passes)
    read = {length for part in plan.unrounded for length in part.lengths}
    assert read == set(lengths)
    # A few tokens, again and again, would be no text.
    assert min(context, 512) <= plan.tokens <= context


def test_lengths_that_do_not_fit_the_context_together_are_read_apart() -> None:
    plan = plan_passes((1, 16, 24, 32), 40)
    starts = [part.lengths for part in plan.unrounded if part.start == 0]
    assert starts == [(32, 1, 1, 1), (24, 16)]
