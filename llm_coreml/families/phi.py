"""Phi 1, 1.5 and 2: attention and a plain MLP side by side behind one LayerNorm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
}
_NAMES = Names(
    modules={
        "self_attn.o_proj": "self_attn.dense",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
        "norm": "final_layernorm",
    }
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Phi `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config}, Keys(eps="layer_norm_eps"), LAYER_NORM)
    qk_norm = None
    if flag(config, "qk_layernorm"):
        qk_norm = QKNormSpec(read.norm.eps, kind="layer", bias=True)
    attention = replace(read.attention, qkv_bias=True, out_bias=True, qk_norm=qk_norm)
    layer = LayerSpec(attention, replace(read.plain_mlp, norm=None), parallel=True)
    plain = read.decoder(read.count * (layer,), (read.rope_of(0.5),))
    return replace(plain, head_bias=True)


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
