"""Granite 3 and 4, dense: Llama's graph with multipliers on its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec
from llm_coreml.families import llama
from llm_coreml.families.family import Family
from llm_coreml.families.fields import number
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Granite `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    plain = llama.spec(config)
    scale = number(config, "attention_multiplier", 1.0)
    layers = [replace(each, mixer=replace(each.mixer, scale=scale)) for each in plain.layers]
    return replace(
        plain,
        layers=tuple(layers),
        embedding_multiplier=number(config, "embedding_multiplier", 1.0),
        residual_multiplier=number(config, "residual_multiplier", 1.0),
        logits_multiplier=1 / number(config, "logits_scaling", 1.0),
    )


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
