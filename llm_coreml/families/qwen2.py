"""Qwen 2 and 2.5: biases of queries, keys and values; windows only where they are switched on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import switched_windows

# transformers' own defaults where config.json is silent.
DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Qwen 2 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**DEFAULTS, **config})
    attention = replace(read.attention, qkv_bias=True)
    layers = [
        LayerSpec(replace(attention, window=window), read.mlp)
        for window in switched_windows(read.config, read.count)
    ]
    return read.decoder(layers, (read.rope,))


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
