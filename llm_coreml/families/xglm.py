"""XGLM: positions as waves, scaled rows of the token table, plain MLPs, biases everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import gpt, opt
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, shown
from llm_coreml.families.names import Names, stored

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 256008,
    "max_position_embeddings": 2048,
    "d_model": 1024,
    "ffn_dim": 4096,
    "num_layers": 24,
    "attention_heads": 16,
    "activation_function": "gelu",
    "scale_embedding": True,
    "tie_word_embeddings": True,
    "norm_eps": 1e-5,
}
_KEYS = Keys(
    hidden="d_model",
    layers="num_layers",
    heads="attention_heads",
    groups="attention_heads",
    inner="ffn_dim",
    eps="norm_eps",
    activation="activation_function",
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an XGLM `config.json`, which does not name the eps of norms.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    gpt.check_alone(config)
    padding = config.get("pad_token_id")
    if isinstance(padding, int) and padding >= 2:
        raise UnsupportedError(
            f"config.json gives pad_token_id = {shown(padding)}; transformers takes the row of "
            "that number out of XGLM's positions. Give a model whose pad_token_id is 1."
        )
    read = Dense({**_DEFAULTS, **config}, _KEYS, LAYER_NORM)
    attention = replace(read.attention, rope=None, qkv_bias=True, out_bias=True)
    plain = read.decoder(read.count * (LayerSpec(attention, read.plain_mlp),), ())
    scale = math.sqrt(read.hidden) if flag(read.config, "scale_embedding") else 1.0
    positions = gpt.computed_positions(read)
    return replace(plain, learned_positions=positions, embedding_multiplier=scale)


def _names(spec: DecoderSpec) -> Names:
    # The first two rows are those of padding.
    waves = gpt.waves(spec, spec.hidden_size // 2 - 1, first=2)
    return Names(modules={**opt.MODULES, "norm": "layer_norm"}, positions=waves)


FAMILY = Family(
    spec,
    lambda spec: stored(spec, _names(spec)),
    gpt.no_notes,
    ignored=("model.embed_positions.weights", "lm_head.weight"),
)
