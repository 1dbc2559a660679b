"""StarCoder 1 and SantaCoder: GPT-2 whose heads share keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import gpt
from llm_coreml.families.arrangements import qkv_blocks
from llm_coreml.families.dense import LAYER_NORM, Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **gpt.DEFAULTS,
    "activation_function": "gelu_pytorch_tanh",
    "multi_query": True,
}
# One key/value head has all queries before it; else each head has its own three together.
_NAMES = Names(
    "transformer.", "h", modules=dict(gpt.MODULES), values=lambda spec, layer: qkv_blocks(layer)
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT-BigCode `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    gpt.check_alone(config)
    read = Dense(known, gpt.KEYS, LAYER_NORM)
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


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), gpt.no_notes, gpt.IGNORED)
