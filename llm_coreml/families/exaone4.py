"""EXAONE 4: norms behind attention and MLP only; beside windows, layers that see all rotate not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.layered import turns
from llm_coreml.families.names import BEHIND, Names, stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 102400,
    "intermediate_size": 16384,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
}
_NAMES = Names(modules=BEHIND)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an EXAONE 4 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    attention = replace(
        read.attention, norm=None, out_norm=read.norm, qk_norm=QKNormSpec(read.norm.eps)
    )
    mlp, window = replace(read.mlp, norm=None, out_norm=read.norm), sliding_window(read.config)
    # Without a window every layer sees all, and rotates.
    seen = turns(read.config, read.count, window, pattern=4 if window else 1)
    layers = [
        LayerSpec(replace(attention, window=each, rope=None if window and not each else 0), mlp)
        for each in seen
    ]
    return read.decoder(layers, (read.rope,))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
