"""OLMo, the first: LayerNorm without gain and bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, NormSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import number
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {**llama.DEFAULTS, "vocab_size": 50304}
# Which no file names.
_NORM = NormSpec(1e-5, "layer", gain=False)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an OLMo `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    clip = None if config.get("clip_qkv") is None else number(config, "clip_qkv")
    attention = replace(read.biased_attention, norm=_NORM, clip=clip)
    layer = LayerSpec(attention, replace(read.mlp, norm=_NORM))
    return replace(read.alike(layer), norm=_NORM)


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
