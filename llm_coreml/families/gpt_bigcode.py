"""StarCoder 1 and SantaCoder: GPT-2 whose heads share keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import gpt2
from llm_coreml.families.arrangements import qkv_blocks
from llm_coreml.families.dense import LAYER_NORM, Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "tie_word_embeddings": True,
}
# One key/value head has all queries before it; else each head has its own three together.
_NAMES = Names(
    "transformer.", "h", modules=gpt2.MODULES, values=lambda spec, layer: qkv_blocks(layer)
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT-BigCode `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    if flag(config, "add_cross_attention"):
        raise UnsupportedError(
            "config.json asks for add_cross_attention, which needs an encoder. Give a model that "
            "continues text."
        )
    read = Dense(known, gpt2.KEYS, LAYER_NORM)
    attention = replace(
        read.attention,
        num_key_value_heads=1 if flag(known, "multi_query") else read.heads,
        rope=None,
        scale=None if known.get("scale_attn_weights") is not False else 1.0,
        qkv_bias=True,
        out_bias=True,
    )
    layers = read.count * (LayerSpec(attention, read.plain_mlp),)
    return replace(read.decoder(layers, ()), learned_positions=read.positions)


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), lambda config: [], gpt2.FAMILY.ignored)
