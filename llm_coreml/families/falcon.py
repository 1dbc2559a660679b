"""Falcon: one matrix for the heads of each group, LayerNorms, RoPE or ALiBi."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import bloom, llama
from llm_coreml.families.alibi import slopes
from llm_coreml.families.arrangements import fused_heads
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, whole
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

_KEYS = Keys(inner="ffn_hidden_size", eps="layer_norm_epsilon", activation="activation")
# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "parallel_attn": True,
    "max_position_embeddings": 2048,
    "activation": "gelu",
    "tie_word_embeddings": True,
}
_TWO = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Falcon `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    grouped, parallel = flag(known, "new_decoder_architecture"), flag(known, "parallel_attn")
    heads = whole(known, "num_attention_heads")
    if not grouped:
        groups = 1 if flag(known, "multi_query") else heads
    else:
        groups = whole(known, "num_kv_heads", heads)
    read = Dense({**known, "num_key_value_heads": groups}, _KEYS, LAYER_NORM)
    bias, far = flag(known, "bias"), slopes(heads) if flag(known, "alibi") else ()
    # transformers scales them with the scores.
    distances = tuple(slope / math.sqrt(read.head_dim) for slope in far)
    rope = None if distances else 0
    attention = replace(read.attention, rope=rope, alibi=distances, qkv_bias=bias, out_bias=bias)
    mlp = replace(read.plain_mlp, bias=bias)
    two = whole(known, "num_ln_in_parallel_attn", 2 if grouped else 1) == 2
    layer = LayerSpec(
        attention, mlp if two or not parallel else replace(mlp, norm=None), parallel=parallel
    )
    return read.decoder(read.count * (layer,), () if distances else (read.rope,))


def _names(spec: DecoderSpec) -> Names:
    layer = spec.layers[0]
    two = layer.parallel and layer.feed_forward.norm is not None
    return Names(
        trunk="transformer.",
        layers="h",
        modules={**bloom.MODULES, **(_TWO if two else {})},
        values=lambda spec, layer: fused_heads(layer),
    )


FAMILY = Family(
    spec, lambda spec: stored(spec, _names(spec)), rope_notes, ignored=llama.FAMILY.ignored
)
