"""BLOOM: ALiBi, LayerNorm also behind the token table, plain MLPs, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families.alibi import slopes
from llm_coreml.families.arrangements import FOUR_TIMES, qkv_blocks
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored

_KEYS = Keys(
    layers="n_layer",
    heads="n_head",
    inner="n_inner",
    positions="seq_length",
    eps="layer_norm_epsilon",
)
# transformers' own defaults where config.json is silent; a length has no part in the model.
_DEFAULTS = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "seq_length": 2048,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
MODULES = {
    "embed_tokens": "word_embeddings",
    "norm": "ln_f",
    **{f"self_attn.{kind}_proj": "self_attention.query_key_value" for kind in "qkv"},
    "self_attn.o_proj": "self_attention.dense",
    **FOUR_TIMES,
}
_NAMES = Names(
    trunk="transformer.",
    layers="h",
    modules={**MODULES, "embed_norm": "word_embeddings_layernorm"},
    values=lambda spec, layer: qkv_blocks(layer),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a BLOOM `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`; also for residual streams that come from norms.
    """
    if flag(config, "apply_residual_connection_post_layernorm"):
        raise UnsupportedError(
            "config.json asks for residual streams that come from norms "
            "(apply_residual_connection_post_layernorm), which the decoder does not compute."
        )
    known = {**_DEFAULTS, **config}
    if config.get("n_embed") is not None:
        known["hidden_size"] = config["n_embed"]
    read = Dense(known, _KEYS, LAYER_NORM)
    attention = replace(
        read.attention, rope=None, alibi=slopes(read.heads), qkv_bias=True, out_bias=True
    )
    plain = read.decoder(read.count * (LayerSpec(attention, read.plain_mlp),), ())
    return replace(plain, embedding_norm=read.norm)


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), lambda _: [], ignored=("lm_head.weight",))
