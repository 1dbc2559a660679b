"""CWM (Code World Model): Llama with windows on three layers of four."""

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
from llm_coreml.families.windows import sliding_window, windows

_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 6144,
    "intermediate_size": 21504,
    "num_hidden_layers": 64,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": 8192,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a CWM `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    if known.get("rope_parameters") is None:
        known["rope_parameters"] = _SCALING
    read = Dense(known)
    kinds = known.get("layer_types") or [
        "sliding_attention" if index % 4 else "full_attention" for index in range(read.count)
    ]
    mlp = replace(read.mlp, bias=flag(known, "mlp_bias"))
    seen = windows({"layer_types": kinds}, read.count, sliding_window(known), default=None)
    layers = [LayerSpec(replace(read.attention, window=each), mlp) for each in seen]
    return read.decoder(layers, (read.rope,))


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
