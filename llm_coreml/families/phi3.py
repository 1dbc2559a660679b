"""Phi 3, 3.5 and 4: fused matrices, a share of each head rotated, LongRoPE, and maybe a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.arrangements import FUSED_GATE, FUSED_QKV, gate_up, qkv_rows
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import renamed_scaling, rope_notes, rope_spec
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_NAMES = Names(
    modules={**FUSED_QKV, **FUSED_GATE},
    values=lambda spec, layer: {**qkv_rows(layer), **gate_up(layer)},
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Phi 3 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    attention = replace(read.attention, window=sliding_window(read.config))
    # What was published as these is what is called longrope today.
    scaled = renamed_scaling(read.config, {"su": "longrope", "yarn": "longrope"})
    rope = rope_spec(scaled, read.head_dim, read.positions, share=1.0)
    return read.decoder(read.count * (LayerSpec(attention, read.mlp),), (rope,))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
