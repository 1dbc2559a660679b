"""GPT-NeoX Japanese: GPT-NeoX one part after the other, with one bias, in the last layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import gpt_neox
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import number, whole
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_multiple_size": 4,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_NAMES = replace(
    gpt_neox.NAMES,
    trunk="gpt_neox_japanese.",
    modules={**gpt_neox.NAMES.modules, "self_attn.o_proj.bias": "attention.dense_bias"},
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a `config.json` of GPT-NeoX Japanese.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    known["partial_rotary_factor"] = number(config, "rotary_pct", 1.0, most=1.0)
    known["rope_theta"] = number(config, "rotary_emb_base", 10000.0)
    read = Dense(known, Keys(groups="num_attention_heads", eps="layer_norm_eps"), LAYER_NORM)
    inner = read.hidden * whole(known, "intermediate_multiple_size")
    mlp = replace(read.plain_mlp, intermediate_size=inner, bias=False)
    layers = [
        LayerSpec(replace(read.attention, out_bias=place == read.count), mlp)
        for place in range(1, read.count + 1)
    ]
    return read.decoder(layers, (read.rope_of(1.0),))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, gpt_neox.FAMILY.ignored)
