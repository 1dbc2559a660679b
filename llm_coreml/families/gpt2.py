"""GPT-2 and its many relatives: learned positions, and matrices that are stored `[in, out]`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import Columns, Rows, Transposed, ValueMap
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
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
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
KEYS = Keys(
    hidden="n_embd",
    layers="n_layer",
    heads="n_head",
    groups="n_head",
    inner="n_inner",
    positions="n_positions",
    eps="layer_norm_epsilon",
    activation="activation_function",
)
MODULES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    **{f"self_attn.{kind}_proj": "attn.c_attn" for kind in "qkv"},
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def _values(spec: DecoderSpec, layer: LayerSpec) -> dict[str, ValueMap]:
    size, found = spec.hidden_size, dict[str, ValueMap]()
    for at, kind in enumerate("qkv"):
        found[f"self_attn.{kind}_proj.weight"] = Columns(at * size, (at + 1) * size, of=3 * size)
        found[f"self_attn.{kind}_proj.bias"] = Rows(at * size, (at + 1) * size, of=3 * size)
    plain = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    return found | {f"{name}.weight": Transposed() for name in plain}


_NAMES = Names("transformer.", "h", modules=MODULES, values=_values)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT-2 `config.json`.

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
    read = Dense(known, KEYS, LAYER_NORM)
    attention = replace(read.attention, rope=None, qkv_bias=True, out_bias=True)
    own = 1 / math.sqrt(read.head_dim) if known.get("scale_attn_weights") is not False else 1.0
    falling = flag(config, "scale_attn_by_inverse_layer_idx")
    layers = [
        LayerSpec(replace(attention, scale=own / (place if falling else 1)), read.plain_mlp)
        for place in range(1, read.count + 1)
    ]
    return replace(read.decoder(layers, ()), learned_positions=read.positions)


FAMILY = Family(
    spec,
    lambda spec: stored(spec, _NAMES),
    lambda config: [],
    # Old checkpoints store masks; a tied head may be written out beside its table.
    ignored=("*.attn.bias", "*.attn.masked_bias", "lm_head.weight"),
)
