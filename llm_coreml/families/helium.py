"""Helium: Llama's graph, rotated by pairs of neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.arrangements import interleaved
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes, rope_spec

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 48000,
    "hidden_size": 2560,
    "intermediate_size": 7040,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-8,
}
_NAMES = Names(values=interleaved)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Helium `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read, bias = Dense({**_DEFAULTS, **config}), flag(config, "attention_bias")
    attention = replace(read.attention, qkv_bias=bias)
    mlp = replace(read.mlp, bias=flag(config, "mlp_bias"))
    rope = rope_spec(config, read.head_dim, read.positions, theta=100000.0)
    return read.decoder(read.count * (LayerSpec(attention, mlp),), (rope,))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
