"""A `tokenizer.json`, loaded and asked with care: its library is native, and the file anybody's.

tokenizer = Tokenizer(Path("out/tokenizer.json"))
tokenizer.prompt("def add(a, b):")
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llm_coreml.errors import CheckpointError, ConfigError
from llm_coreml.tokenizer.failures import raised_as
from llm_coreml.tokenizer.trial import try_apart

if TYPE_CHECKING:
    import tokenizers

# One of these is read by any tokenizer, if only as an unknown word.
_PROBES = ("a", "0", " ", "\n", "\u4e2d")
# Decoders by which a token may change the spaces before it.
_REVISING = ("WordPiece", "CTC")


class Tokenizer:
    """A `tokenizer.json`.

    Attributes:
        beginning: Tokens that the tokenizer itself puts before a text: mostly one or none, in GLM
            two. (config.json may name a beginning token that the model never saw.)
        changed: The file asks for truncation, padding or dropout, which are left out here.

    Args:
        path: The file.

    Raises:
        CheckpointError: the file is damaged, or its library ends, hangs or fails on plain texts.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        try_apart(path)
        with _native(f"'{path}' is no tokenizer", "Save it again."):
            # Its own way to open a file takes only names that are text.
            self._tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        # Left over from training, each would change what is read without a word.
        model = self._tokenizer.model
        dropout = isinstance(model, tokenizers.models.BPE) and model.dropout is not None
        self.changed = bool(self._tokenizer.truncation or self._tokenizer.padding or dropout)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if dropout:
            model.dropout = None
        self.beginning = self._beginning()

    def _beginning(self) -> tuple[int, ...]:
        for probe in _PROBES:
            plain, marked = self.encode(probe), self._encode(probe, special=True).ids
            found = [at for at in range(len(marked)) if marked[at : at + len(plain)] == plain]
            if plain and found:
                return tuple(marked[: found[0]])
        return ()

    @cached_property
    def revises(self) -> bool:
        """Whether a token may change the text of those before it, beyond unfinished characters."""
        described = json.loads(self._tokenizer.to_str())["decoder"] or {}
        parts = [described, *described.get("decoders", ())]
        return any(part.get("type") in _REVISING for part in parts)

    @cached_property
    def special(self) -> dict[str, int]:
        """The ids of special tokens, by their text."""
        return {
            token.content: number
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }

    @property
    def size(self) -> int:
        """The number of ids: one more than the largest."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def save(self, path: Path) -> None:
        """Write the tokenizer, without what is left out here, for other runners to read.

        Raises:
            OSError: the file cannot be written.
        """
        path.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without any that begin or end a text.

        Raises:
            ConfigError: the text holds half of a surrogate pair.
            CheckpointError: the tokenizer has no token for a part of it.
        """
        ids: list[int] = self._encode(text, special=False).ids
        return ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens of `text`, as `encode` has them, and where in it each of them ends.

        Raises:
            ConfigError: see `encode`.
            CheckpointError: see `encode`.
        """
        encoded = self._encode(text, special=False)
        return encoded.ids, [end for _, end in encoded.offsets]

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        """Return the library's own record of the tokens of `text`; see `encode`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"The text holds {text[error.start]!a} at {error.start}, half of a surrogate pair "
                "and no character; give valid Unicode."
            ) from None
        with _native(f"The tokenizer cannot read {text[:40]!r}", "Give a text that it knows."):
            return self._tokenizer.encode(text, add_special_tokens=special)

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of `text` as a model reads it: with the beginning tokens, if any.

        A text that has them already, such as a chat template's, is not given them again.
        """
        ids, beginning = self.encode(text), list(self.beginning)
        return ids if ids[: len(beginning)] == beginning else [*beginning, *ids]

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Return the text of `tokens`; special tokens are left out unless `special`.

        Raises:
            ConfigError: a token is no id.
        """
        try:
            with _native("The tokenizer cannot write these tokens", "Use those of its model."):
                text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=not special)
        except (OverflowError, TypeError):
            raise ConfigError("Tokens are whole numbers from 0 on; give such.") from None
        return text

    def token(self, text: str) -> int | None:
        """Return the id of the token that is written `text`, or None."""
        if text.encode(errors="ignore").decode() != text:  # half of a surrogate pair is in none
            return None
        number: int | None = self._tokenizer.token_to_id(text)
        return number


def _native(failure: str, advice: str) -> contextlib.AbstractContextManager[None]:
    """Turn what the library raises into a CheckpointError, but for wrong arguments."""
    return raised_as(
        lambda error: CheckpointError(f"{failure}: {error}. {advice}"),
        but=(OverflowError, TypeError, MemoryError),
    )
