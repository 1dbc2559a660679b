"""The ids that begin and end a text, as a model's files name them, and those that they forget.

bos, eos = special_ids(config, generation_config)
ends = end_tokens(Path("model"), tokenizer)              # {"<|im_end|>": 2}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_coreml.errors import CheckpointError
from llm_coreml.tokenizer.chat_template import find_template, named_tokens
from llm_coreml.tokenizer.text_tokenizer import Tokenizer


def special_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> tuple[int | None, tuple[int, ...]]:
    """Return the beginning token and the tokens that end a text; either may be absent.

    `generation_config.json` wins over `config.json`, as it does in transformers.

    Raises:
        CheckpointError: a value is no token or list of tokens.
    """
    bos = _named("bos_token_id", config, generation_config)
    eos = _named("eos_token_id", config, generation_config)
    if len(bos) > 1:
        raise CheckpointError(f"bos_token_id is {list(bos)}; a text has one beginning token.")
    return (bos[0] if bos else None), eos


def _named(
    name: str, config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> tuple[int, ...]:
    value = generation_config.get(name, config.get(name))
    if value is None:
        return ()
    tokens = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise CheckpointError(
            f"{name} is {str(value)[:60]!r}; it must be a token, a whole number, or a list of "
            "them. Mend config.json or generation_config.json."
        )
    return tuple(dict.fromkeys(tokens))


def within(tokens: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Return those of `tokens` that a model of `vocab_size` can name."""
    return tuple(token for token in tokens if 0 <= token < vocab_size)


def end_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Return what ends a text by the tokenizer's files: its end token, a chat template's.

    A fine-tune for chat often leaves the base model's end in config.json, which no turn ends with.

    Args:
        folder: Where tokenizer_config.json and its like are.
        tokenizer: The tokenizer in it.

    Returns:
        Ids by their tokens.
    """
    named = named_tokens(folder).get("eos_token")
    template = find_template(folder)
    turn = None if template is None else template.end_of_turn(tokenizer.special)
    texts = [text for text in (named, turn) if text is not None]
    found = {text: tokenizer.token(text) for text in texts}
    return {text: number for text, number in found.items() if number is not None}
