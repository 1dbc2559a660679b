"""What GPT-2 and those that were written after it share: names, and refusals.

read = Dense({**DEFAULTS, **config}, KEYS, LAYER_NORM)
check_alone(config)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llm_coreml.errors import UnsupportedError
from llm_coreml.families.dense import Keys
from llm_coreml.families.fields import flag

# transformers' own defaults where config.json is silent.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
)
KEYS = Keys(
    hidden="n_embd",
    layers="n_layer",
    heads="n_head",
    groups="n_head",
    inner="n_inner",
    positions="n_positions",
    eps="layer_norm_epsilon",
    activation="activation_function",
)
MODULES: Mapping[str, str] = MappingProxyType(
    {
        "embed_tokens": "wte",
        "embed_positions": "wpe",
        "norm": "ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        **{f"self_attn.{kind}_proj": "attn.c_attn" for kind in "qkv"},
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    }
)
# Old checkpoints store masks; a tied head may be written out beside its table.
IGNORED = ("*.attn.bias", "*.attn.masked_bias", "lm_head.weight")


def check_alone(config: Mapping[str, Any]) -> None:
    """Refuse a decoder that reads an encoder. Raises UnsupportedError."""
    if flag(config, "add_cross_attention"):
        raise UnsupportedError(
            "config.json asks for add_cross_attention, which needs an encoder. Give a model that "
            "continues text."
        )


def no_notes(config: Mapping[str, Any]) -> list[str]:
    """Return nothing: without rotary embedding there is no second spelling."""
    return []
