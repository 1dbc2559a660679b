"""Cohere 2 (Command R7B, Command A): Cohere with windows; other layers rotate nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, NormSpec
from llm_coreml.families import llama
from llm_coreml.families.arrangements import interleaved
from llm_coreml.families.dense import Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, number
from llm_coreml.families.layered import turns
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "logit_scale": 0.0625,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_NAMES = Names(values=interleaved)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Cohere 2 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    read = Dense(known, Keys(eps="layer_norm_eps"), NormSpec(kind="layer"))
    bias = flag(config, "attention_bias")
    attention = replace(read.attention, qkv_bias=bias, out_bias=bias)
    mlp = replace(read.mlp, norm=None)
    layers = [
        LayerSpec(
            replace(attention, window=window, rope=None if window is None else 0),
            mlp,
            parallel=True,
        )
        for window in turns(known, read.count, sliding_window(known), pattern=4)
    ]
    plain = read.decoder(layers, (read.rope,))
    return replace(plain, logits_multiplier=number(read.config, "logit_scale"))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
