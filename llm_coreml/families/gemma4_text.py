"""Gemma 4, its text model: E2B, E4B, 12B and 31B.

Layers with a window have small heads, those without large ones. The last layers may attend to keys
and values of earlier ones, each to those of the last layer of its own type that has any. The larger
models make keys and values of one matrix in the layers without a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    PerLayerSpec,
    QKNormSpec,
)
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.families.dense import Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, number, shown, table, whole
from llm_coreml.families.names import SANDWICH, Names, stored
from llm_coreml.families.rotary import rope_notes, rope_spec
from llm_coreml.families.windows import sliding_window, windows

_FULL, _LOCAL = "full_attention", "sliding_attention"
# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
}
# The text model inside of the one that sees and hears without towers (12B).
_UNIFIED = {
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "hidden_size_per_layer_input": 0,
}
_ROTARY = {
    _LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
# Without `layer_types`, every sixth layer sees everything.
_PATTERN = 6
_NAMES = Names(
    modules={
        **SANDWICH,
        "per_layer.embed_tokens": "embed_tokens_per_layer",
        "per_layer.projection": "per_layer_model_projection",
        "per_layer.norm": "per_layer_projection_norm",
        "per_layer.gate_proj": "per_layer_input_gate",
        "per_layer.out_proj": "per_layer_projection",
        "per_layer_out_norm": "post_per_layer_input_norm",
    }
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Gemma 4 text `config.json`.

    Raises:
        CheckpointError: a field is of another type or out of range, or makes no sense.
        UnsupportedError: experts, or an option that the decoder does not compute.
    """
    known = {key: value for key, value in config.items() if value is not None}
    unified = _UNIFIED if config["model_type"] == "gemma4_unified_text" else {}
    read = Dense({**_DEFAULTS, **unified, **known}, Keys(activation="hidden_activation"))
    if flag(config, "enable_moe_block"):
        raise UnsupportedError(
            "config.json has enable_moe_block: a mixture of experts beside the dense layers, which "
            "is planned and not computed yet. Give a dense Gemma 4, such as E2B or 31B."
        )
    if config.get("use_bidirectional_attention") == "all":
        raise UnsupportedError(
            "config.json gives use_bidirectional_attention = 'all': every token sees those after "
            "it, too, which no causal LM does."
        )
    kinds, rotary = _kinds(read), {"rope_parameters": _ROTARY, **known}
    layers = [_layer(read, kinds, index) for index in range(read.count)]
    wide = {kind: layers[kinds.index(kind)].mixer.head_dim for kind in set(kinds)}
    tables = [
        rope_spec(rotary, wide.get(kind, read.head_dim), read.positions, share=1.0, layer_type=kind)
        for kind in (_FULL, _LOCAL)
    ]
    cap = "final_logit_softcapping"
    alike = replace(read, config={**read.config, "per_layer_config": None})
    return replace(
        alike.decoder(layers, tables),
        per_layer=_per_layer(read),
        embedding_multiplier=math.sqrt(read.hidden),
        logits_softcap=number(config, cap) if config.get(cap) is not None else None,
    )


def _kinds(read: Dense) -> list[str]:
    """Return the type of every layer; the last sees everything whatever the file says."""
    found = read.config.get("layer_types")
    if found is None:
        found = [_LOCAL if (index + 1) % _PATTERN else _FULL for index in range(read.count)]
    windows(read.config, read.count, sliding_window(read.config), None)  # or it is refused
    return [*found[:-1], _FULL]


def _layer(read: Dense, kinds: list[str], index: int) -> LayerSpec:
    kind, attention = kinds[index], _attention(read, kinds[index], index)
    shares = _owner(read, kinds, index)
    attention = replace(attention, shares=shares)
    mlp = replace(read.mlp, out_norm=read.norm)
    if shares is not None and flag(read.config, "use_double_wide_mlp"):
        mlp = replace(mlp, intermediate_size=2 * mlp.intermediate_size)
    if kind == _LOCAL:
        attention = replace(attention, window=sliding_window(read.config), rope=1)
    return LayerSpec(attention, mlp, scaled=True)


def _attention(read: Dense, kind: str, index: int) -> AttentionSpec:
    """Return the attention of a layer, as if it saw everything and had its own keys and values."""
    same = kind == _FULL and flag(read.config, "attention_k_eq_v")
    own: dict[str, Any] = {}
    if kind == _FULL:
        groups = read.config.get("num_global_key_value_heads") if same else None
        own = {"head_dim": read.config["global_head_dim"], "num_key_value_heads": groups}
    single = table(read.config, "per_layer_config")
    if single:
        own = dict(single.get(str(index)) or {})
        unknown = sorted(own.keys() - {"head_dim", "num_key_value_heads"})
        if unknown:
            raise UnsupportedError(
                f"config.json gives layer {index} a {shown(unknown[0])} of its own "
                "(per_layer_config); head_dim and num_key_value_heads are what layers may have."
            )
    sizes, usual = {k: v for k, v in own.items() if v is not None}, read.biased_attention
    return replace(
        usual,
        head_dim=whole(sizes, "head_dim", usual.head_dim),
        num_key_value_heads=whole(sizes, "num_key_value_heads", usual.num_key_value_heads),
        out_norm=read.norm,
        scale=1.0,
        qk_norm=QKNormSpec(read.norm.eps),
        value_norm=replace(read.norm, gain=False),
        keys_are_values=same,
    )


def _owner(read: Dense, kinds: list[str], index: int) -> int | None:
    """Return the layer whose keys and values a layer attends to, None for its own."""
    count = read.config.get("num_kv_shared_layers") or 0
    first = read.count - (whole(read.config, "num_kv_shared_layers") if count else 0)
    if index < first:
        return None
    if kinds[index] not in kinds[: max(0, first)]:
        raise CheckpointError(
            f"config.json gives num_kv_shared_layers = {shown(count)}, and no layer before these "
            f"is of the type {kinds[index]}. Download or save the model again."
        )
    return max(at for at in range(first) if kinds[at] == kinds[index])


def _per_layer(read: Dense) -> PerLayerSpec | None:
    if not read.config["hidden_size_per_layer_input"]:
        return None
    width = whole(read.config, "hidden_size_per_layer_input")
    return PerLayerSpec(
        vocab_size=whole(read.config, "vocab_size_per_layer_input"),
        width=width,
        norm=read.norm,
        activation=read.activation,
        table_multiplier=math.sqrt(width),
        products_multiplier=1 / math.sqrt(read.hidden),
        sum_multiplier=1 / math.sqrt(2),
    )


# Published files hold keys and values of layers that use those of others, and transformers skips
# them too.
FAMILY = Family(
    spec,
    lambda spec: stored(spec, _NAMES),
    rope_notes,
    ignored=("lm_head.weight", "*.self_attn.[kv]_proj.weight", "*.self_attn.[kv]_norm.weight"),
)
