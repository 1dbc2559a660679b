"""Jais 2: Llama with LayerNorm, plain MLPs of squared ReLU, and biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 150272,
    "hidden_size": 3328,
    "intermediate_size": 26624,
    "num_attention_heads": 26,
    "hidden_act": "relu2",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "attention_bias": True,
    "mlp_bias": True,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Jais 2 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config}, Keys(eps="layer_norm_eps"), LAYER_NORM)
    mlp = replace(read.plain_mlp, bias=flag(read.config, "mlp_bias"))
    return read.alike(LayerSpec(read.biased_attention, mlp))


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
