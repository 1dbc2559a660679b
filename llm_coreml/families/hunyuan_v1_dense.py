"""Hunyuan V1, dense: queries and keys are normed once rotated, and a fixed NTK scaling of RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec, RopeSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import number
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_kind, rope_notes, rope_spec, rope_values

# transformers' own defaults where config.json is silent.
_DEFAULTS = {**llama.DEFAULTS, "vocab_size": 290943, "rms_norm_eps": 1e-5}
_NAMES = Names(
    modules={"self_attn.q_norm": "self_attn.query_layernorm",
             "self_attn.k_norm": "self_attn.key_layernorm"}
)  # fmt: skip


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Hunyuan `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    qk_norm = QKNormSpec(read.norm.eps, rotated=True)
    attention = replace(read.biased_attention, qk_norm=qk_norm)
    return read.decoder(read.count * (LayerSpec(attention, read.mlp),), (_rope(read),))


def _rope(read: Dense) -> RopeSpec:
    """Return the table. What is called dynamic is a larger base for good, if it has an `alpha`."""
    values = rope_values(read.config)
    if rope_kind(values) != "dynamic" or not values.get("alpha"):
        return read.rope
    unscaled = {**read.config, "rope_scaling": {**values, "rope_type": "default"}}
    rope = rope_spec(unscaled, read.head_dim, read.positions)
    alpha = number(values, "alpha", where="RoPE in config.json", most=1e6)
    return replace(rope, theta=rope.theta * alpha ** (rope.dim / max(1, rope.dim - 2)))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
