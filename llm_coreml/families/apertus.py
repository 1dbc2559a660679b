"""Apertus: plain MLPs of xIELU, and norms of each head's queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import Softplus
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, MLPSpec, QKNormSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import table, whole
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 131072,
    "intermediate_size": 14336,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "hidden_act": "xielu",
}
_THETA = 12000000.0
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": _THETA,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_NAMES = Names(
    modules={
        "input_layernorm": "attention_layernorm",
        "post_attention_layernorm": "feedforward_layernorm",
    },
    values=lambda spec, layer: {
        "mlp.act_fn.alpha_p": Softplus(),
        "mlp.act_fn.alpha_n": Softplus(0.5),
    },
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an Apertus `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    if known.get("rope_theta") is None:
        known["rope_theta"] = _THETA
    if not (table(config, "rope_parameters") or table(config, "rope_scaling")):
        known["rope_parameters"] = _ROPE  # whatever base is given beside it
    read = Dense(known)
    attention = replace(read.biased_attention, qk_norm=QKNormSpec(read.norm.eps))
    learned = known["hidden_act"] == "xielu"
    inner = whole(known, "intermediate_size")
    activation = "xielu" if learned else read.activation
    mlp = MLPSpec(inner, read.norm, activation=activation, gated=False)
    return read.alike(LayerSpec(attention, mlp))


FAMILY = Family(
    spec,
    lambda spec: stored(spec, _NAMES),
    rope_notes,
    # Two numbers of xIELU that are the same in every model.
    ignored=(*llama.FAMILY.ignored, "*.act_fn.beta", "*.act_fn.eps"),
)
