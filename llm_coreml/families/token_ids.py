"""The tokens that begin and end a text, as config.json and generation_config.json name them.

ids, notes = known_ids(config, "config.json", vocab_size=32000)
ids                                     # {"bos_token_id": 1, "eos_token_id": [2]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.errors import CheckpointError
from llm_coreml.families.fields import shown

_BOS, _EOS = "bos_token_id", "eos_token_id"


def known_ids(
    values: Mapping[str, Any], where: str, vocab_size: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the ids that a file names and the vocabulary has, and a sentence for each other one.

    Ids that a model cannot produce are common: -1 for none, and tokens that were added to a
    tokenizer alone.

    Args:
        values: The parsed file.
        where: What a message calls it.
        vocab_size: Rows of the token table.

    Raises:
        CheckpointError: an id is no whole number; `eos_token_id` alone may be a list of them.
    """
    ids: dict[str, Any] = {}
    notes = []
    for key in (_BOS, _EOS):
        value = values.get(key)
        given = value if key == _EOS and isinstance(value, list) else [value]
        found = [_whole(each, key, where) for each in given if each is not None]
        known = [each for each in found if 0 <= each < vocab_size]
        notes += [
            f"{where} gives {key} = {shown(each)}, which is none of the {vocab_size} tokens that "
            "the model has; it is left out."
            for each in found
            if each not in known
        ]
        if known:
            ids[key] = known if key == _EOS else known[0]
    return ids, notes


def _whole(value: object, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        several = " or a list of them" if key == _EOS else ""
        raise CheckpointError(
            f"{where} gives {key} = {shown(value)}; it must be the id of a token{several}, a whole "
            "number. Download or save the model again."
        )
    return value
