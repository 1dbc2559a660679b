"""Gemma 3, its text: windows in turn, with a rotary table of their own; norms of each head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec
from llm_coreml.families import gemma2, llama
from llm_coreml.families.family import Family
from llm_coreml.families.fields import number
from llm_coreml.families.gemma_parts import NAMES, attention_of, finished, gemma
from llm_coreml.families.layered import in_turn, tables_of, turns
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
_DEFAULTS = {**gemma2.DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Gemma 3 `config.json`, or the part of one that is of text.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = gemma({**_DEFAULTS, **config})
    attention = replace(attention_of(read), qk_norm=QKNormSpec(read.norm.eps))
    mlp = replace(read.mlp, out_norm=read.norm)
    seen = turns(read.config, read.count, sliding_window(read.config), pattern=6)
    rotary = tables_of(
        config,
        read.head_dim,
        read.positions,
        full=number(config, "rope_theta", 1e6),
        sliding=number(config, "rope_local_base_freq", 1e4),
    )
    return finished(read, read.decoder(in_turn(LayerSpec(attention, mlp), seen), rotary))


FAMILY = Family(spec, lambda spec: stored(spec, NAMES), rope_notes, ignored=llama.FAMILY.ignored)
