"""The text of a measurement: read, and cut so that no token is counted twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_coreml.errors import ConfigError
from llm_coreml.eval.heldout import cut, read_text

BOS = (-1,)
# Every token of a text is another, so that each can be followed.
TEXTS = st.integers(2, 400).map(lambda count: list(range(count)))


@given(TEXTS, st.integers(2, 90), st.booleans(), st.integers(1, 500))
def test_every_token_is_scored_once_and_in_order(
    tokens: list[int], window: int, begins: bool, limit: int
) -> None:
    windows = cut(tokens, window, BOS if begins else (), limit)
    scored = [token for piece in windows for token in piece[1:]]
    # Without a beginning token nothing foretells the first one.
    readable = tokens if begins else tokens[1:]
    assert scored == readable[:limit]
    assert all(2 <= len(piece) <= window for piece in windows)
    # Only the last window may be short.
    assert all(len(piece) == window for piece in windows[:-1])
    if begins:
        assert all(piece[0] == BOS[0] and BOS[0] not in piece[1:] for piece in windows)
    else:
        # The given token is the one before the first that is scored.
        assert all(piece[0] == piece[1] - 1 for piece in windows)


@pytest.mark.parametrize("beginning", [(), BOS])
@pytest.mark.parametrize("limit", [1, 7, 8, 9, 1000])
def test_more_text_than_is_scored_changes_nothing(beginning: tuple[int, ...], limit: int) -> None:
    assert cut(range(2000), 8, beginning, limit) == cut(range(limit + 1), 8, beginning, limit)


@pytest.mark.parametrize(("tokens", "beginning"), [([], ()), ([5], ()), ([], BOS)])
def test_too_little_text(tokens: list[int], beginning: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"shorter than two tokens; give a longer one with --t"):
        cut(tokens, 8, beginning, 10)


@pytest.mark.parametrize("beginning", [(), BOS])
def test_no_room_is_refused(beginning: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="A context of 1 positions has no room"):
        cut(range(10), 1, beginning, 10)


def test_one_token_after_the_beginning_is_enough() -> None:
    assert cut([5], 8, BOS, 10) == [[*BOS, 5]]


def test_a_beginning_of_two_tokens_begins_every_window() -> None:
    windows = cut(range(7), 5, (-2, -1), 100)
    assert windows == [[-2, -1, 0, 1, 2], [-2, -1, 3, 4, 5], [-2, -1, 6]]
    with pytest.raises(ConfigError, match="A context of 2 positions has no room"):
        cut(range(7), 2, (-2, -1), 100)


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    assert read_text(path) == ("a.txt", "Grüße\n")
    name, text = read_text(None)
    assert name == "bundled held-out text" and len(text) > 10_000
