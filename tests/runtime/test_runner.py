"""What every runner does alike: splitting, bounds, feeding, generating."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fake_runner import FakeRunner
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.errors import ConfigError
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import split_lengths
from llm_coreml.runtime.sampling import Sampler

VOCAB = 11
# After token t the likeliest is t + 1.
SUCCESSOR = torch.eye(VOCAB).roll(1, dims=1) * 5 + torch.randn(VOCAB, VOCAB) * 0.01
LENGTHS = st.sets(st.integers(1, 600), max_size=8).map(lambda lengths: tuple(lengths | {1}))


def fake(**changes: Any) -> FakeRunner:
    return FakeRunner(SUCCESSOR, **changes)


def test_split_of_a_known_prompt() -> None:
    assert split_lengths(77, (1, 8, 64, 512)) == [64, 8, 1, 1, 1, 1, 1]
    assert split_lengths(0, (1, 8)) == []


@given(st.integers(0, 3000), LENGTHS)
def test_split_sums_up_largest_first(count: int, lengths: tuple[int, ...]) -> None:
    parts = split_lengths(count, lengths)
    assert sum(parts) == count and set(parts) <= set(lengths)
    assert parts == sorted(parts, reverse=True)
    left = count
    for part in parts:
        assert part == max(length for length in lengths if length <= left)
        left -= part


@pytest.mark.parametrize("every_row", [False, True])
def test_step_gives_rows_and_moves_on(every_row: bool) -> None:
    runner = fake(every_row=every_row, drift=0.5)
    first, second = runner.step([1, 2, 3, 4]), runner.step([5])
    assert first.shape == ((4, VOCAB) if every_row else (1, VOCAB))
    assert first.dtype == second.dtype == torch.float32
    assert runner.calls == [([1, 2, 3, 4], 0), ([5], 4)] and runner.position == 5
    runner.reset()
    assert runner.position == 0 and runner.resets == 1


@pytest.mark.parametrize("token", [-1, VOCAB, 10**12])
def test_token_outside_the_vocabulary(token: int) -> None:
    runner = fake()
    with pytest.raises(ConfigError, match=rf"Token {token} is outside .* of {VOCAB} entries; use"):
        runner.step([1, token, 2, 3])
    assert runner.calls == [] and runner.position == 0


def test_context_is_full() -> None:
    runner = fake(context=8)
    runner.step([0] * 4)
    with pytest.raises(ConfigError, match="4 tokens are in the cache and 8 more do not fit its 8"):
        runner.step([0] * 8)
    runner.step([0] * 4)
    with pytest.raises(ConfigError, match="8 tokens are in the cache and 1 more"):
        runner.step([0])
    assert len(runner.calls) == 2


@pytest.mark.parametrize("read", ["feed", "logits", "generate"])
def test_what_does_not_fit_is_refused_before_anything_is_computed(read: str) -> None:
    runner = fake(context=8)
    with pytest.raises(ConfigError, match="0 tokens are in the cache and 9 more"):
        if read == "generate":
            list(runner.generate([0] * 9, 1))
        else:
            getattr(runner, read)([0] * 9)
    assert runner.calls == []


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=32), st.booleans(), LENGTHS)
def test_feed_is_the_last_row_of_logits(
    tokens: list[int], every_row: bool, lengths: tuple[int, ...]
) -> None:
    runner = fake(every_row=every_row, seq_lengths=lengths, drift=0.25)
    rows = runner.logits(tokens)
    assert rows.shape == (len(tokens), VOCAB)
    expected = SUCCESSOR[torch.tensor(tokens)]
    expected = expected + torch.arange(len(tokens)).unsqueeze(1) * torch.arange(VOCAB) * 0.25
    assert torch.equal(rows, expected)
    runner.reset()
    assert torch.equal(runner.feed(tokens), rows[-1])
    assert runner.position == len(tokens)


def test_feed_continues_and_logits_begins_anew() -> None:
    runner = fake()
    runner.feed([1, 2, 3])
    runner.feed([4])
    assert [start for _, start in runner.calls] == [0, 1, 2, 3]
    runner.logits([5])
    assert runner.calls[-1] == ([5], 0)


def test_nothing_to_read() -> None:
    with pytest.raises(ConfigError, match="no tokens to feed; give at least one"):
        fake().feed([])
    with pytest.raises(ConfigError, match="no tokens to feed"):
        list(fake().generate([], 5))
    assert fake().logits([]).shape == (0, VOCAB)


@pytest.mark.parametrize(
    ("prompt", "most", "stop", "expected"),
    [
        ([1], 3, (), [2, 3, 4]),
        ([7, 1, 2], 1, (), [3]),
        ([1], 9, (5,), [2, 3, 4]),  # the stop token itself is not told
        ([4], 9, (5, 6), []),
        ([1] * 6, 9, (), [2, 3, 4]),  # eight positions hold six and two more; a third is foretold
        ([1] * 8, 9, (), [2]),
        ([10], 2, (), [0, 1]),
    ],
)
def test_generate(prompt: list[int], most: int, stop: tuple[int, ...], expected: list[int]) -> None:
    runner = fake(context=8)
    runner.step([0])
    assert list(runner.generate(prompt, most, stop)) == expected
    # No call is made for a token that nobody asked for.
    read = sum(len(chunk) for chunk, _ in runner.calls[1:])
    assert read <= len(prompt) + max(0, len(expected) - (not stop))


@pytest.mark.parametrize("meanwhile", ["generate", "reset", "step", "rewind", "logits"])
def test_a_text_does_not_go_on_in_the_cache_of_another(meanwhile: str) -> None:
    runner = fake()
    text = runner.generate([1, 2], 4)
    next(text)
    other: dict[str, Callable[[], object]] = {
        "generate": lambda: next(runner.generate([1, 2], 4)),
        "reset": runner.reset,
        "step": lambda: runner.step([3]),
        "rewind": lambda: runner.rewind(2),
        "logits": lambda: runner.logits([1, 2]),
    }
    other[meanwhile]()
    with pytest.raises(ConfigError, match="has read something else since this text was begun"):
        next(text)


def test_generate_asks_the_sampler() -> None:
    class Third(Sampler):
        def choose(self, logits: torch.Tensor) -> int:
            assert logits.shape == (VOCAB,)
            return 3

    assert list(fake().generate([1], 4, (), Third())) == [3] * 4


def test_runner_of_a_bundle(bundle: Path) -> None:
    runner = open_runner(open_bundle(bundle))
    assert isinstance(runner, ReferenceRunner)
    assert (runner.context, runner.seq_lengths, runner.vocab_size) == (64, (1, 8), 300)
    assert runner.every_row is False and runner.label == "reference runtime"


@pytest.mark.parametrize(
    ("token", "told"),
    [
        (None, "Token None is no whole number"),
        ("1", "Token '1' is no whole number"),
        (1.0, "Token 1.0 is no whole number"),
        ([1], "is no whole number"),
        (VOCAB, "Token 11 is outside the vocabulary of 11 entries"),
        (-1, "Token -1 is outside"),
        (2**63, "is outside"),
        (10**5000, "Token a number of 5001 digits is outside"),
    ],
    ids=range(8),
)
def test_tokens_that_are_none_are_refused(token: Any, told: str) -> None:
    runner = fake()
    for feed in (runner.feed, runner.logits):
        with pytest.raises(ConfigError) as caught:
            feed([1, token])
        assert told in str(caught.value)
    assert len(runner.logits(torch.tensor([1, 2]).numpy())) == 2, "any library's whole numbers"
