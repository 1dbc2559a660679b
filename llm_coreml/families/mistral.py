"""Mistral: Llama's graph without biases, with a sliding window unless `config.json` has a null."""

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
from llm_coreml.families.windows import sliding_window, windows

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Mistral `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    window = sliding_window(read.config)
    layers = [
        LayerSpec(replace(read.attention, window=each), read.mlp)
        for each in windows(config, read.count, window, default=window)
    ]
    return read.decoder(layers, (read.rope,))


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
