"""EXAONE 3, 3.5 and Deep: Llama under names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec
from llm_coreml.families import llama
from llm_coreml.families.family import Family
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# What transformers reads as the second; files on the hub have the first.
_OLD = {
    "num_layers": "num_hidden_layers",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 102400,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_NAMES = Names(
    "transformer.",
    "h",
    modules={
        "embed_tokens": "wte",
        "norm": "ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        **{f"self_attn.{kind}_proj": f"attn.attention.{kind}_proj" for kind in "qkv"},
        "self_attn.o_proj": "attn.attention.out_proj",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    },
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an EXAONE `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    renamed = {new: config[old] for old, new in _OLD.items() if old in config}
    return llama.spec({**_DEFAULTS, **renamed, **config})


FAMILY = Family(
    spec,
    lambda spec: stored(spec, _NAMES),
    rope_notes,
    ignored=llama.FAMILY.ignored,
    other_names=(stored,),
)
