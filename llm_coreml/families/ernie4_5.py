"""ERNIE 4.5, dense: Llama rotated by pairs of neighbours."""

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
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an ERNIE 4.5 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read, bias = Dense({**_DEFAULTS, **config}), flag(config, "use_bias")
    attention = replace(read.attention, qkv_bias=bias, out_bias=bias)
    layer = LayerSpec(attention, replace(read.mlp, bias=bias))
    rope = rope_spec(read.config, read.head_dim, read.positions, theta=500000.0)
    return read.decoder(read.count * (layer,), (rope,))


FAMILY = Family(
    spec,
    lambda spec: stored(spec, Names(values=interleaved)),
    rope_notes,
    ignored=llama.FAMILY.ignored,
)
