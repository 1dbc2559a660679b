"""Qwen 3: each head's queries and keys are normed; windows only where they are switched on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec
from llm_coreml.families import llama, qwen2
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import switched_windows

# transformers' own defaults where config.json is silent.
_DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Qwen 3 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    qk_norm = QKNormSpec(read.norm.eps)
    attention = replace(read.biased_attention, qk_norm=qk_norm)
    layers = [
        LayerSpec(replace(attention, window=window), read.mlp)
        for window in switched_windows(read.config, read.count)
    ]
    return read.decoder(layers, (read.rope,))


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
