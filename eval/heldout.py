"""The text that models are measured on, cut into windows.

windows = cut(tokenizer.encode(text), window=512, beginning=(1,), limit=4096)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer

_HELDOUT = "heldout.txt"
# Two models' logits of a window are held at a time: 1 GB at a vocabulary of 128 thousand.
_LONGEST_WINDOW = 1024


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
    if tokenizer is None:
        raise ArtifactError(
            "This bundle was exported without a tokenizer, so no text can be read; export again "
            "with one."
        )
    opened = Tokenizer(tokenizer)
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
