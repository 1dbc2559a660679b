"""BioGPT: scaled rows of the token table, and learned positions of which two are padding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import opt
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.gpt import no_notes
from llm_coreml.families.names import Names, stored

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 42384,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "max_position_embeddings": 1024,
    "scale_embedding": True,
    "tie_word_embeddings": True,
}
_NAMES = Names(
    trunk="biogpt.",
    head="output_projection",
    modules={**opt.MODULES, "norm": "layer_norm"},
    first_position=2,
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a BioGPT `config.json`, whose layer_norm_eps transformers passes over.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config, "norm_eps": 1e-5}
    read = Dense(known, Keys(groups="num_attention_heads", eps="norm_eps"), LAYER_NORM)
    attention = replace(read.attention, rope=None, qkv_bias=True, out_bias=True)
    plain = read.decoder(read.count * (LayerSpec(attention, read.plain_mlp),), ())
    scale = math.sqrt(read.hidden) if flag(known, "scale_embedding") else 1.0
    return replace(plain, learned_positions=read.positions, embedding_multiplier=scale)


FAMILY = Family(
    spec,
    lambda spec: stored(spec, _NAMES),
    no_notes,
    ignored=("output_projection.weight",),
)
