"""MPT: ALiBi, LayerNorm without bias, plain MLPs, one matrix for queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, NormSpec
from llm_coreml.families.alibi import ordered_slopes
from llm_coreml.families.arrangements import qkv_rows
from llm_coreml.families.dense import Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import number, shown, table
from llm_coreml.families.names import Names, stored

_KEYS = Keys("d_model", "n_layers", "n_heads", positions="max_seq_len", eps="layer_norm_epsilon")
# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 50368,
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "max_seq_len": 2048,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
}
_MODULES = {
    "embed_tokens": "wte",
    "norm": "norm_f",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    **{f"self_attn.{kind}_proj": "attn.Wqkv" for kind in "qkv"},
    "self_attn.o_proj": "attn.out_proj",
    "mlp.up_proj": "ffn.up_proj",
    "mlp.down_proj": "ffn.down_proj",
}
_NAMES = Names("transformer.", "blocks", modules=_MODULES, values=lambda _, layer: qkv_rows(layer))


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an MPT `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config}, _KEYS, NormSpec(kind="layer"))
    options = table(config, "attn_config")
    # A zero clips nothing.
    clip = number(options, "clip_qkv") if options.get("clip_qkv") else None
    scale = None
    if options.get("softmax_scale") is not None:
        scale = number(options, "softmax_scale")
    slopes = ordered_slopes(read.heads)
    attention = replace(read.attention, rope=None, alibi=slopes, scale=scale, clip=clip)
    mlp = replace(read.plain_mlp, bias=False)
    return read.decoder(read.count * (LayerSpec(attention, mlp),), ())


def notes(config: Mapping[str, Any]) -> list[str]:
    """Return what an MPT `config.json` says that is read otherwise than it looks."""
    largest = table(config, "attn_config").get("alibi_bias_max", 8)
    told = f"config.json gives alibi_bias_max = {shown(largest)}; transformers takes 8 whatever it"
    return [] if largest == 8 else [f"{told} says, and so does this export."]


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), notes, ignored=("lm_head.weight",))
