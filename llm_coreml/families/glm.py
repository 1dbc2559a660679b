"""GLM 4 of 2024: half of each head is rotated, by pairs of neighbours; gate and up are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import Then, ValueMap
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.arrangements import (
    FUSED_GATE,
    FUSED_QKV,
    gate_up,
    interleaved,
    qkv_rows,
)
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes, rope_spec

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}
NAMES = Names(
    modules=FUSED_GATE, values=lambda spec, layer: {**interleaved(spec, layer), **gate_up(layer)}
)


def _of_one(spec: DecoderSpec, layer: LayerSpec) -> dict[str, ValueMap]:
    turned, rows = interleaved(spec, layer), qkv_rows(layer)
    parts = {
        name: Then(part, turned[name]) if name in turned else part for name, part in rows.items()
    }
    return {**parts, **gate_up(layer)}


# As the code that came before transformers' own has queries, keys and values.
_ONE = Names(modules={**FUSED_GATE, **FUSED_QKV}, values=_of_one)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GLM `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    attention = replace(read.attention, qkv_bias=flag(read.config, "attention_bias"))
    rope = rope_spec(read.config, read.head_dim, read.positions, share=0.5)
    return read.decoder(read.count * (LayerSpec(attention, read.mlp),), (rope,))


FAMILY = Family(
    spec,
    lambda spec: stored(spec, NAMES),
    rope_notes,
    ignored=llama.FAMILY.ignored,
    other_names=(lambda spec: stored(spec, _ONE),),
)
