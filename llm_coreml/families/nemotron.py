"""Nemotron: LayerNorm with gains about zero, squared ReLU, and partly rotated heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import PlusOne
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 48,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
}
_NAMES = Names(gains=PlusOne())


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Nemotron `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config}, Keys(eps="norm_eps"), LAYER_NORM)
    layer = LayerSpec(read.biased_attention, replace(read.plain_mlp, bias=flag(config, "mlp_bias")))
    return read.decoder(read.count * (layer,), (read.rope_of(0.5),))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
