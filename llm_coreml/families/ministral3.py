"""Ministral 3: Mistral with YaRN, and queries that grow with their position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QueryGrowth
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import LARGEST_POSITION, number, whole
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes, rope_values
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 131072,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
}
_SCALING = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Ministral 3 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    if not rope_values(known) and known.get("rope_parameters") is None:
        known["rope_parameters"] = _SCALING
    read, values = Dense(known), rope_values(known)
    where = "RoPE in config.json"
    growth = QueryGrowth(
        number(values, "llama_4_scaling_beta", where=where),
        whole(values, "original_max_position_embeddings", read.positions, where, LARGEST_POSITION),
    )
    window = sliding_window(read.config)
    return read.alike(
        LayerSpec(replace(read.attention, window=window, query_growth=growth), read.mlp)
    )


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
