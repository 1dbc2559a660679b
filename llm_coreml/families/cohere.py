"""Cohere (Command R, Aya): LayerNorm, attention and MLP side by side, rotated by neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, NormSpec, QKNormSpec
from llm_coreml.families import llama
from llm_coreml.families.arrangements import interleaved, interleaved_gains
from llm_coreml.families.dense import Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, number
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes, rope_spec

# transformers' own defaults where config.json is silent.
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "logit_scale": 0.0625,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_NAMES = Names(
    values=lambda spec, layer: {**interleaved(spec, layer), **interleaved_gains(spec, layer)}
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Cohere `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**DEFAULTS, **config}, Keys(eps="layer_norm_eps"), NormSpec(kind="layer"))
    qk_norm = None
    if flag(config, "use_qk_norm"):
        qk_norm = QKNormSpec(read.norm.eps, kind="layer", own=True)
    attention = replace(read.biased_attention, qk_norm=qk_norm)
    layer = LayerSpec(attention, replace(read.mlp, norm=None), parallel=True)
    rope = rope_spec(read.config, read.head_dim, read.positions, theta=500000.0)
    plain = read.decoder(read.count * (layer,), (rope,))
    return replace(plain, logits_multiplier=number(read.config, "logit_scale"))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
