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
        changed: The file asks for truncation or padding, which are left out here.

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
        # Left over from fine-tuning, either would change what is read without a word.
        self.changed = bool(self._tokenizer.truncation or self._tokenizer.padding)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        marked = self._tokenizer.encode("a", add_special_tokens=True).ids
        found = [at for at in range(len(marked)) if marked[at : at + len(plain)] == plain]
        self.bos_id: int | None = marked[0] if found and found[0] > 0 else None

    def save(self, path: Path) -> None:
        """Write the tokenizer, without truncation and padding, for other runners to read."""
        self._tokenizer.save(str(path))

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


def convert(folder: Path, path: Path) -> None:
    """Write a `tokenizer.json` to `path` for a tokenizer that `folder` holds in another form.

    Llama 2 and others come as a sentencepiece model alone, which transformers can convert.

    Raises:
        CheckpointError: it cannot.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.backend_tokenizer.save(str(path))
    except Exception as error:  # whatever the tokenizer's own library raises
        raise CheckpointError(
            f"The tokenizer in '{folder}' cannot be turned into a tokenizer.json: {error}. Save it "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        ) from None


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
