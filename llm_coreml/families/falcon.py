"""Falcon: three generations of one block, all rotated; those with ALiBi are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import bloom
from llm_coreml.families.arrangements import qkv_blocks
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, whole
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "activation": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "parallel_attn": True,
    "tie_word_embeddings": True,
}
_KEYS = Keys(groups="num_kv_heads", inner="ffn_hidden_size",
             eps="layer_norm_epsilon", activation="activation")  # fmt: skip
_TWO = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Falcon `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    if config.get("n_embed") is not None:
        known["hidden_size"] = config["n_embed"]
    if flag(config, "alibi"):
        raise UnsupportedError(
            "config.json asks for alibi, which Falcon rounds to bfloat16; a program in fp16 is "
            "another model. Give a Falcon with rotary embedding."
        )
    read, bias = Dense(known, _KEYS, LAYER_NORM), flag(known, "bias")
    new = flag(config, "new_decoder_architecture")
    attention = replace(read.attention, qkv_bias=bias, out_bias=bias)
    if not new:
        heads = 1 if flag(known, "multi_query") else read.heads
        attention = replace(attention, num_key_value_heads=heads)
    parallel = flag(known, "parallel_attn")
    own = not parallel or (new and whole(known, "num_ln_in_parallel_attn", 2) == 2)
    mlp = replace(read.plain_mlp, norm=read.norm if own else None, bias=bias)
    return read.alike(LayerSpec(attention, mlp, parallel))


def _names(spec: DecoderSpec) -> Names:
    layer = spec.layers[0]
    two = layer.parallel and layer.feed_forward.norm is not None
    modules = {**bloom.MODULES, **_TWO} if two else bloom.MODULES
    return Names("transformer.", "h", modules=modules, values=lambda _, each: qkv_blocks(each))


FAMILY = Family(
    spec,
    lambda spec: stored(spec, _names(spec)),
    rope_notes,
    ignored=("*.rotary_emb.inv_freq", "lm_head.weight"),
)
