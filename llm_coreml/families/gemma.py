"""Gemma, the first: gains that are stored as their difference from one, and GeGLU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import PlusOne
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_NAMES = Names(gains=PlusOne())


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Gemma `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    if known["hidden_act"] == "gelu":  # as the first files say of what was trained with tanh
        known["hidden_act"] = "gelu_pytorch_tanh"
    if flag(config, "use_bidirectional_attention"):
        raise UnsupportedError(
            "config.json asks for use_bidirectional_attention; a decoder sees what came before. "
            "Give a model that generates text."
        )
    read = Dense(known)
    attention = read.biased_attention
    plain = read.alike(LayerSpec(attention, read.mlp))
    return replace(plain, embedding_multiplier=math.sqrt(read.hidden))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
