"""GPT BigCode (SantaCoder, StarCoder 1): learned positions, one head of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import gptj
from llm_coreml.families.arrangements import fused_heads
from llm_coreml.families.dense import LAYER_NORM, Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "multi_query": True,
    "tie_word_embeddings": True,
}
# GPT-2's names of what GPT-Neo has, too.
MODULES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_ATTENTION = {f"self_attn.{kind}_proj": "attn.c_attn" for kind in "qkv"}
_NAMES = Names(
    trunk="transformer.",
    layers="h",
    modules={**MODULES, **_ATTENTION, "self_attn.o_proj": "attn.c_proj"},
    values=lambda spec, layer: fused_heads(layer),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT BigCode `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`; also for attention to another model.
    """
    known = {**_DEFAULTS, **config}
    if flag(known, "add_cross_attention"):
        raise UnsupportedError("config.json asks for add_cross_attention, which is not computed.")
    groups = {"num_key_value_heads": 1} if flag(known, "multi_query") else {}
    read = Dense({**known, **groups}, gptj.KEYS, LAYER_NORM)
    scale = None if flag(known, "scale_attn_weights") else 1.0
    attention = replace(read.attention, rope=None, scale=scale, qkv_bias=True, out_bias=True)
    plain = read.decoder(read.count * (LayerSpec(attention, read.plain_mlp),), ())
    return replace(plain, learned_positions=read.positions)


FAMILY = Family(
    spec, lambda spec: stored(spec, _NAMES), lambda _: [], ignored=("*.attn.bias", "lm_head.weight")
)
