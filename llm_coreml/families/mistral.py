"""Mistral without a sliding window: Llama's graph, with a window by default in `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec
from llm_coreml.families import llama
from llm_coreml.families.family import Family

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "sliding_window": 4096,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Mistral `config.json`; refuses sliding windows, see `llama.spec`."""
    return llama.spec({**_DEFAULTS, **config})


FAMILY = Family(spec, llama.stored, ignored=llama.FAMILY.ignored)
