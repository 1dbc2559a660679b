"""nanochat: norms without gains, one behind the token table, and heads rotated the other way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import ExchangedHalves
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, NormSpec, QKNormSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import number
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 768,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "max_position_embeddings": 2048,
    "hidden_act": "relu2",
    "final_logit_softcapping": 15.0,
}
_NAMES = Names(
    modules={"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"},
    values=lambda spec, layer: {
        "self_attn.q_proj": ExchangedHalves(layer.mixer.num_attention_heads),
        "self_attn.k_proj": ExchangedHalves(layer.mixer.num_key_value_heads),
    },
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a nanochat `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config}, kind=NormSpec(gain=False))
    qk_norm = QKNormSpec(read.norm.eps, rotated=True, gain=False)
    attention = replace(read.biased_attention, qk_norm=qk_norm)
    cap = read.config["final_logit_softcapping"]
    return replace(
        read.alike(LayerSpec(attention, replace(read.plain_mlp, bias=False))),
        embedding_norm=read.norm,
        logits_softcap=None if cap is None else number(read.config, "final_logit_softcapping"),
    )


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
