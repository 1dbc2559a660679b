"""Arcee's AFM: Llama with plain MLPs of squared ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an Arcee `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    attention = read.biased_attention
    mlp = replace(read.mlp, gated=False, bias=flag(config, "mlp_bias"))
    return read.alike(LayerSpec(attention, mlp))


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
