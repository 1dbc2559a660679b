"""The text that quantization is calibrated on, in windows of tokens.

    content = read_content("bundled")                          # before anything is fetched
    text = tokenize("bundled", content, tokenizer, tokens=4096, context=2048)
    text.windows, text.sha256

The bundled text is documentation of Python that is no part of the held-out text, on which exports
are measured. The bundled model was not trained on its first 21,000 tokens, and was on the rest. Nor
may another text share a passage with the held-out one: figures on what a model was fitted to say
little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_coreml.errors import ConfigError
from llm_coreml.lfs import pointer_advice
from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer

BUNDLED_TEXT = "bundled"
_FILES = {"calibration": "calibration.txt", "heldout": "heldout.txt"}
# Blocks read a window at a time, and the time that attention takes grows with its square.
_LONGEST_WINDOW = 512
# Consecutive words that two texts do not have in common by chance.
_PASSAGE = 40


@dataclass(frozen=True)
class CalibrationText:
    """A text as the calibrated model reads it.

    Attributes:
        name: `bundled`, or the name of the file.
        tokens: Tokens of the text, those that begin a window not counted.
        windows: Tokens to read, each window on its own.
    """

    name: str
    tokens: int
    windows: tuple[tuple[int, ...], ...]

    @property
    def sha256(self) -> str:
        """Hash of the windows: decimal tokens with spaces between, a line for each window."""
        lines = (" ".join(map(str, window)) + "\n" for window in self.windows)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_content(source: str) -> str:
    """Return the text called `bundled`, or the one in the file `source`.

    Raises:
        ConfigError: it cannot be read as UTF-8, or holds a passage of the held-out text.
    """
    if source == BUNDLED_TEXT:
        return (bundled_model() / _FILES["calibration"]).read_text(encoding="utf-8")
    if advice := pointer_advice(Path(source)):
        raise ConfigError(f"--calibrate: {advice}")
    try:
        content = Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--calibrate '{source}' cannot be read: {error}. Give a UTF-8 file, or 'bundled'."
        ) from None
    heldout = (bundled_model() / _FILES["heldout"]).read_text(encoding="utf-8")
    if passage := common_passage(content, heldout):
        raise ConfigError(
            f"--calibrate '{source}' shares a passage with the held-out text, on which exports are "
            f"measured ('{passage[:60]}...'); give another text."
        )
    return content


def tokenize(
    source: str,
    content: str,
    tokenizer: Path,
    tokens: int,
    context: int,
    flag: str = "--calibrate",
) -> CalibrationText:
    """Cut the beginning of a text into windows.

    Args:
        source: `bundled` or the file, for the record.
        content: The text.
        tokenizer: The model's `tokenizer.json`.
        tokens: How many of the text to read.
        context: Positions of the decoder's cache.
        flag: The option that asks for it.

    Raises:
        ConfigError: the text has fewer tokens, or there is no tokenizer to count them.
    """
    if not tokenizer.is_file():
        raise ConfigError(
            f"{flag} reads a text, and the model comes without a tokenizer that could; give "
            f"one, or leave {flag} out."
        )
    opened = Tokenizer(tokenizer)
    found = opened.encode(content)
    if len(found) < tokens:
        raise ConfigError(
            f"--calibrate '{source}' holds {len(found)} tokens, fewer than --calibration-tokens "
            f"{tokens}; give a longer text or ask for fewer tokens."
        )
    step = min(context, _LONGEST_WINDOW) - len(opened.beginning)
    windows = tuple(
        (*opened.beginning, *found[at : min(at + step, tokens)]) for at in range(0, tokens, step)
    )
    return CalibrationText(Path(source).name, tokens, windows)


def common_passage(text: str, other: str) -> str | None:
    """Return some words that stand in both texts one after the other, if there are so many."""
    known = set(_passages(other.split()))
    return next((passage for passage in _passages(text.split()) if passage in known), None)


def _passages(words: Sequence[str]) -> Iterator[str]:
    for at in range(len(words) - _PASSAGE + 1):
        yield " ".join(words[at : at + _PASSAGE])
