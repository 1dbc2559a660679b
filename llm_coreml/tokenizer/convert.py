"""A `tokenizer.json` for a tokenizer that comes in another form: sentencepiece, tiktoken, others.

note = convert(Path("model"), Path("out/tokenizer.json"), config)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_coreml.errors import CheckpointError
from llm_coreml.tokenizer.failures import raised_as

if TYPE_CHECKING:
    import tokenizers

_TIKTOKEN = "tokenizer.model"
# A line of a tiktoken file: base64, and a rank.
_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
# Llama 3's special tokens follow its ranks in this order, reserved ones in between; a
# tokenizer.model holds ranks alone (github.com/meta-llama/llama-models, llama3/tokenizer.py).
_LLAMA3_SPECIALS = 256
_LLAMA3_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}


def convert(folder: Path, path: Path, config: Mapping[str, Any]) -> str | None:
    """Write a `tokenizer.json` to `path` for a tokenizer that `folder` holds in another form.

    Llama 2 and others come as a sentencepiece model alone, which transformers can convert; Llama 3
    as tiktoken's ranks, whose special tokens stand in no file.

    Args:
        folder: Where the tokenizer's files are.
        path: The file to write.
        config: The model's config.json, by which Llama 3's special tokens are known.

    Returns:
        What the reader of the file should know, or None.

    Raises:
        CheckpointError: it cannot.
        OSError: the file cannot be written.
    """
    from transformers import AutoTokenizer

    failed = raised_as(
        lambda error: CheckpointError(
            f"The tokenizer in '{folder}' cannot be turned into a tokenizer.json: {error}. Save it "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    )
    with failed:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        backend = tokenizer.backend_tokenizer
        note = _add_specials(backend, config) if _is_tiktoken(folder / _TIKTOKEN) else None
        text = backend.to_str(pretty=True)
    path.write_text(text, encoding="utf-8")
    return note


def _is_tiktoken(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return all(_RANK.fullmatch(file.readline(1 << 16)) for _ in range(16))


def _add_specials(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> str | None:
    """Give tiktoken's ranks Llama 3's special tokens if they are its, and say what was done."""
    if any(token.special for token in backend.get_added_tokens_decoder().values()):
        return None
    ranks, vocabulary = backend.get_vocab_size(), config.get("vocab_size")
    if vocabulary != ranks + _LLAMA3_SPECIALS or config.get("bos_token_id") != ranks:
        return (
            "tokenizer.model is a tiktoken file, which holds no special tokens, and the model's "
            "are not known: a text that names one, such as a chat's, is read as plain letters. Put "
            "the model's tokenizer.json beside it and export again."
        )
    from tokenizers import AddedToken, processors

    names = list(_llama3_names())
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A", special_tokens=[(names[0], ranks)]
    )
    return (
        "tokenizer.model is a tiktoken file, which holds no special tokens; those of Llama 3 were "
        f"added, from {names[0]!r} ({ranks}) on, since vocabulary and beginning token are its."
    )


def _llama3_names() -> Iterator[str]:
    reserved = 0
    for place in range(_LLAMA3_SPECIALS):
        name = _LLAMA3_NAMED.get(place)
        if name is None:
            name = f"reserved_special_token_{reserved}"
            reserved += 1
        yield f"<|{name}|>"
