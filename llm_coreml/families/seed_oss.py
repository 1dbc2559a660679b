"""Seed-OSS: Llama's graph with biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 155136,
    "hidden_size": 4096,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "attention_bias": True,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Seed-OSS `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    attention = replace(
        read.attention,
        qkv_bias=flag(read.config, "attention_bias"),
        out_bias=flag(config, "attention_out_bias"),
    )
    return read.alike(LayerSpec(attention, replace(read.mlp, bias=flag(config, "mlp_bias"))))


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
