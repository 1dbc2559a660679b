"""OLMo 2: norms behind attention and MLP only, and of all queries and keys of a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.names import BEHIND, Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
DEFAULTS = {**llama.DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5}
_NAMES = Names(modules=BEHIND)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an OLMo 2 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**DEFAULTS, **config})
    return read.alike(layer(read))


def layer(read: Dense) -> LayerSpec:
    """Return a layer with norms behind its parts, and of all queries and keys of a token."""
    attention = replace(
        read.biased_attention,
        norm=None,
        out_norm=read.norm,
        qk_norm=QKNormSpec(read.norm.eps, over="all"),
    )
    return LayerSpec(attention, replace(read.mlp, norm=None, out_norm=read.norm))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
