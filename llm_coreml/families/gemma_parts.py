"""What Gemma 2 and 3 share: norms on both sides, scales of their own, caps, and names of all that.

read = gemma({**DEFAULTS, **config})
attention_of(read), finished(read, read.decoder(layers, rotary))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import PlusOne
from llm_coreml.decoder.spec import AttentionSpec, DecoderSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families.dense import Dense, Keys
from llm_coreml.families.fields import flag, number
from llm_coreml.families.names import SANDWICH, Names

NAMES = Names(modules=SANDWICH, gains=PlusOne())


def gemma(config: Mapping[str, Any]) -> Dense:
    """Return the `config.json` of a Gemma as read. Raises UnsupportedError for an encoder's."""
    if flag(config, "use_bidirectional_attention"):
        raise UnsupportedError(
            "config.json asks for use_bidirectional_attention; a decoder sees what came before. "
            "Give a model that generates text."
        )
    return Dense(config, Keys(activation="hidden_activation"))


def attention_of(read: Dense) -> AttentionSpec:
    """Return attention between two norms, with the scale of its own."""
    scale = number(read.config, "query_pre_attn_scalar") ** -0.5
    return replace(read.biased_attention, scale=scale, out_norm=read.norm)


def cap(config: Mapping[str, Any], key: str) -> float | None:
    """Return what scores or logits are capped at, None for no cap."""
    return None if config.get(key) is None else number(config, key)


def finished(read: Dense, plain: DecoderSpec) -> DecoderSpec:
    """Return the decoder with what its ends have: a factor for tokens, and a cap of logits."""
    softcap = cap(read.config, "final_logit_softcapping")
    multiplier = math.sqrt(read.hidden)
    return replace(plain, embedding_multiplier=multiplier, logits_softcap=softcap)
