"""The text that models are measured on, cut into windows.

read = read_heldout(Path("wiki.txt"), bundle.tokenizer, context=2048, limit=4096)
read.windows[0], read.sizes[0].words
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.eval.results import Window
from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer

_HELDOUT = "heldout.txt"
# Two models' logits of a window are held at a time: 1 GB at a vocabulary of 128 thousand.
_LONGEST_WINDOW = 1024


@dataclass(frozen=True)
class HeldOut:
    """A text, ready to be read.

    Attributes:
        name: Of the text.
        sha256: Of all of it.
        windows: The first token of each is given, the others are scored.
        sizes: What each scores.
    """

    name: str
    sha256: str
    windows: tuple[tuple[int, ...], ...]
    sizes: tuple[Window, ...]

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return sum(size.tokens for size in self.sizes)


def read_heldout(
    text: str | Path | None, tokenizer: Path | None, context: int, limit: int
) -> HeldOut:
    """Return a text in windows, with the words and bytes that each of them scores.

    Words are parted by white space, as lm-eval parts them, and belong to the window in which they
    end. For the arguments and errors see `read_windows`.
    """
    opened = _opened(tokenizer)
    name, content = read_text(None if text is None else Path(text))
    tokens, after = opened.encode_with_ends(content)
    windows = cut_to_context(tokens, context, opened.beginning, limit)
    given = len(opened.beginning)
    ends = [0, *after]
    # Where the scored part of each window begins and ends, in tokens of the text.
    borders = [0 if given else 1]
    for window in windows:
        borders.append(borders[-1] + len(window) - (given or 1))
    places = [ends[border] for border in borders]
    gaps = [found.start() for found in re.finditer(r"\s+", content)]
    sizes: list[Window] = []
    for window, (start, stop) in zip(windows, pairwise(places), strict=True):
        words = bisect_left(gaps, stop) - bisect_left(gaps, start) + (not sizes)
        sizes.append(Window(len(window) - 1, words, len(content[start:stop].encode())))
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return HeldOut(name, sha256, tuple(map(tuple, windows)), tuple(sizes))


def _opened(tokenizer: Path | None) -> Tokenizer:
    if tokenizer is None:
        raise ArtifactError(
            "This bundle was exported without a tokenizer, so no text can be read; export again "
            "with one."
        )
    return Tokenizer(tokenizer)


def read_windows(
    text: str | Path | None, tokenizer: Path | None, context: int, limit: int
) -> tuple[str, list[list[int]]]:
    """Return the name of a text and its windows.

    Args:
        text: UTF-8 file; None takes the held-out text that ships in the package.
        tokenizer: The model's `tokenizer.json`, None if it has none.
        context: Positions of the model's cache.
        limit: Most tokens to score over all windows.

    Raises:
        ArtifactError: there is no tokenizer.
        ConfigError: the text cannot be used.
    """
    opened = _opened(tokenizer)
    name, content = read_text(None if text is None else Path(text))
    return name, cut_to_context(opened.encode(content), context, opened.beginning, limit)


def cut_to_context(
    tokens: Sequence[int], context: int, beginning: Sequence[int], limit: int
) -> list[list[int]]:
    """Cut `tokens` into windows that a cache of `context` positions holds, see `cut`."""
    return cut(tokens, min(context, _LONGEST_WINDOW), beginning, limit)


def read_text(path: Path | None) -> tuple[str, str]:
    """Return name and content of the text at `path`, or of the one that ships in the package.

    Raises:
        ConfigError: it cannot be read as UTF-8, or is empty.
    """
    if path is None:
        return "bundled held-out text", (bundled_model() / _HELDOUT).read_text(encoding="utf-8")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text '{path}' cannot be read: {error}. Give a UTF-8 file.") from None
    if not text.strip():
        raise ConfigError(f"--text '{path}' is empty; give a text of some hundred words.")
    return path.name, text


def cut(
    tokens: Sequence[int], window: int, beginning: Sequence[int], limit: int
) -> list[list[int]]:
    """Cut `tokens` into consecutive windows, each of which begins with `beginning`.

    Every token of the text is scored once at most: a window's first token is given, and so the
    windows overlap by one token where there is no beginning. Of a beginning of several tokens, each
    is scored but the first.

    Args:
        tokens: The text, without special tokens.
        window: Longest window, the beginning counted.
        beginning: Tokens that begin a text; none, mostly one, or more.
        limit: Most tokens of the text to score over all windows.

    Returns:
        Windows of at least two tokens.

    Raises:
        ConfigError: fewer than two tokens to look at, or room for fewer.
    """
    given, overlap = list(beginning), 0 if beginning else 1
    room = window - len(given)
    if room < 1 + overlap:
        raise ConfigError(f"A context of {window} positions has no room for a token to score.")
    windows, start = [], 0
    while start < limit and start + overlap < len(tokens):
        piece = list(tokens[start : min(start + room, limit + overlap)])
        windows.append([*given, *piece])
        start += len(piece) - overlap
    if not windows:
        raise ConfigError("The text is shorter than two tokens; give a longer one with --text.")
    return windows
