"""The tokenizer of a bundle, and the ids that begin and end a text.

tokenizer = Tokenizer(Path("out/tokenizer.json"))
tokenizer.prompt("def add(a, b):")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_coreml.errors import CheckpointError


class Tokenizer:
    """A `tokenizer.json`.

    Attributes:
        bos_id: Token that the tokenizer itself puts before a text, or None. (config.json may name
            a beginning token that the model never saw.)

    Args:
        path: The file.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"'{path}' is no tokenizer: {error}. Save it again.") from None
        text = self._tokenizer.encode("a", add_special_tokens=True).ids
        before = text[: text.index(self.encode("a")[0])]
        self.bos_id: int | None = before[0] if before else None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without any that begin or end a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of `text` as a model reads it: with the beginning token, if any."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, special tokens left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def special_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> tuple[int | None, tuple[int, ...]]:
    """Return the beginning token and the tokens that end a text; either may be absent.

    `generation_config.json` wins over `config.json`, as it does in transformers.
    """
    bos = generation_config.get("bos_token_id", config.get("bos_token_id"))
    eos = generation_config.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        return bos, ()
    return bos, tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
