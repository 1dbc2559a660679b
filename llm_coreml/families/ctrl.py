"""CTRL: positions as waves, scaled rows of the token table, a head with a bias."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import gpt
from llm_coreml.families.dense import LAYER_NORM, Dense
from llm_coreml.families.family import Family
from llm_coreml.families.names import Names, stored

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 246534,
    "n_positions": 256,
    "n_embd": 1280,
    "dff": 8192,
    "n_layer": 48,
    "n_head": 16,
    "layer_norm_epsilon": 1e-6,
    "activation": "relu",
    "tie_word_embeddings": True,
}
_KEYS = replace(gpt.KEYS, inner="dff", activation="activation")
# Of all norms but the last, whatever a file says.
_EPSILON = 1e-6
_MODULES = {
    "embed_tokens": "w",
    "norm": "layernorm",
    "input_layernorm": "layernorm1",
    "post_attention_layernorm": "layernorm2",
    **{f"self_attn.{kind}_proj": f"multi_head_attention.W{kind}" for kind in "qkv"},
    "self_attn.o_proj": "multi_head_attention.dense",
    "mlp.up_proj": "ffn.0",
    "mlp.down_proj": "ffn.2",
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a CTRL `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config, "activation": "relu"}, _KEYS, LAYER_NORM)
    norm = replace(read.norm, eps=_EPSILON)
    attention = replace(read.attention, norm=norm, rope=None, qkv_bias=True, out_bias=True)
    layer = LayerSpec(attention, replace(read.plain_mlp, norm=norm))
    return replace(
        read.decoder(read.count * (layer,), ()),
        learned_positions=gpt.computed_positions(read),
        embedding_multiplier=math.sqrt(read.hidden),
        head_bias=True,
    )


def _names(spec: DecoderSpec) -> Names:
    waves = gpt.waves(spec, spec.hidden_size // 2)
    return Names("transformer.", "h", modules=_MODULES, positions=waves)


FAMILY = Family(spec, lambda spec: stored(spec, _names(spec)), gpt.no_notes, gpt.IGNORED)
