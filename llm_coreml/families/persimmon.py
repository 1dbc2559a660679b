"""Persimmon: fused matrices, norms of each head's queries and keys, half of each rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec
from llm_coreml.families.arrangements import FOUR_TIMES, FUSED_HEADS, qkv_blocks
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "hidden_act": "relu2",
    "max_position_embeddings": 16384,
    "layer_norm_eps": 1e-5,
    "qk_layernorm": True,
}
_NAMES = Names(
    modules={
        **FUSED_HEADS,
        "self_attn.o_proj": "self_attn.dense",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        **FOUR_TIMES,
        "norm": "final_layernorm",
    },
    values=lambda spec, layer: qkv_blocks(layer),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Persimmon `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    read = Dense(known, Keys(groups="num_attention_heads", eps="layer_norm_eps"), LAYER_NORM)
    qk_norm = QKNormSpec(read.norm.eps, kind="layer", bias=True)
    attention = replace(
        read.attention,
        qkv_bias=True,
        out_bias=True,
        qk_norm=qk_norm if flag(known, "qk_layernorm") else None,
    )
    layer = LayerSpec(attention, read.plain_mlp)
    return read.decoder(read.count * (layer,), (read.rope_of(0.5),))


FAMILY = Family(
    spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=("*.rotary_emb.inv_freq",)
)
