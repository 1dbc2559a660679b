"""Gemma 2: windows in turn, norms on both sides of a layer's parts, capped scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.family import Family
from llm_coreml.families.gemma_parts import NAMES, attention_of, cap, finished, gemma
from llm_coreml.families.layered import turns
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Gemma 2 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = gemma({**DEFAULTS, **_CAPS, **config})
    softcap = cap(read.config, "attn_logit_softcapping")
    attention = replace(attention_of(read), softcap=softcap)
    mlp = replace(read.mlp, out_norm=read.norm)
    layers = [
        LayerSpec(replace(attention, window=window), mlp)
        for window in turns(
            {**read.config, "sliding_window_pattern": 2}, read.count, sliding_window(read.config), 2
        )
    ]
    return finished(read, read.decoder(layers, (read.rope,)))


FAMILY = Family(spec, lambda spec: stored(spec, NAMES), rope_notes, ignored=llama.FAMILY.ignored)
