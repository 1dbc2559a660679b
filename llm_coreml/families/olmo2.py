"""OLMo 2: norms behind attention and MLP only, and of all queries and keys of a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {**llama.DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5}
NAMES = Names(
    modules={
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an OLMo 2 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read, bias = Dense({**_DEFAULTS, **config}), flag(config, "attention_bias")
    attention = replace(
        read.attention,
        norm=None,
        out_norm=read.norm,
        qk_norm=QKNormSpec(read.norm.eps, over="all"),
        qkv_bias=bias,
        out_bias=bias,
    )
    return read.alike(LayerSpec(attention, replace(read.mlp, norm=None, out_norm=read.norm)))


FAMILY = Family(spec, lambda spec: stored(spec, NAMES), rope_notes, ignored=llama.FAMILY.ignored)
