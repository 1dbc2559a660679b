"""Cohere 2 (Command R7B, Command A): Cohere with windows; other layers rotate nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, NormSpec
from llm_coreml.families import cohere, llama
from llm_coreml.families.arrangements import interleaved
from llm_coreml.families.dense import Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import number
from llm_coreml.families.layered import turns
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
_DEFAULTS = {**cohere.DEFAULTS, "sliding_window": 4096}
_NAMES = Names(values=interleaved)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Cohere 2 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    read = Dense(known, Keys(eps="layer_norm_eps"), NormSpec(kind="layer"))
    attention = read.biased_attention
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
