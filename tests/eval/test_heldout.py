"""The text of a measurement: read, and cut so that no token is counted twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_coreml.errors import ConfigError
from llm_coreml.eval.heldout import cut, read_text

BOS = -1
# Every token of a text is another, so that each can be followed.
TEXTS = st.integers(2, 400).map(lambda count: list(range(count)))


@given(TEXTS, st.integers(2, 90), st.booleans(), st.integers(1, 500))
def test_every_token_is_scored_once_and_in_order(
    tokens: list[int], window: int, begins: bool, limit: int
) -> None:
    bos_id = BOS if begins else None
    windows = cut(tokens, window, bos_id, limit)
    scored = [token for piece in windows for token in piece[1:]]
    # Without a beginning token nothing foretells the first one.
    readable = tokens if begins else tokens[1:]
    assert scored == readable[:limit]
    assert all(2 <= len(piece) <= window for piece in windows)
    # Only the last window may be short.
    assert all(len(piece) == window for piece in windows[:-1])
    if begins:
        assert all(piece[0] == BOS and BOS not in piece[1:] for piece in windows)
    else:
        # The given token is the one before the first that is scored.
        assert all(piece[0] == piece[1] - 1 for piece in windows)


@pytest.mark.parametrize("bos_id", [None, BOS])
@pytest.mark.parametrize("limit", [1, 7, 8, 9, 1000])
def test_more_text_than_is_scored_changes_nothing(bos_id: int | None, limit: int) -> None:
    assert cut(range(2000), 8, bos_id, limit) == cut(range(limit + 1), 8, bos_id, limit)


@pytest.mark.parametrize(("tokens", "bos_id"), [([], None), ([5], None), ([], BOS)])
def test_too_little_text(tokens: list[int], bos_id: int | None) -> None:
    with pytest.raises(ConfigError, match=r"shorter than two tokens; give a longer one with --t"):
        cut(tokens, 8, bos_id, 10)


@pytest.mark.parametrize("bos_id", [None, BOS])
def test_no_room_is_refused(bos_id: int | None) -> None:
    with pytest.raises(ConfigError, match="A context of 1 positions has no room"):
        cut(range(10), 1, bos_id, 10)


def test_one_token_after_the_beginning_is_enough() -> None:
    assert cut([5], 8, BOS, 10) == [[BOS, 5]]


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    assert read_text(path) == ("a.txt", "Grüße\n")
    name, text = read_text(None)
    assert name == "bundled held-out text" and len(text) > 10_000
