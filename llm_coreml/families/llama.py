"""Llama 2, 3, 3.1 and 3.2, and everything else that uses `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from llm_coreml.checkpoint.weights_view import Stored
from llm_coreml.decoder.spec import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    RopeKind,
    RopeSpec,
)
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.families.family import Family
from llm_coreml.families.fields import number, table, whole

# transformers' own defaults where config.json is silent.
_POSITIONS = 2048
_EPSILON = 1e-6
_THETA = 10000.0


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Llama `config.json`.

    Raises:
        CheckpointError: a field is missing, of another type, or makes no sense.
        UnsupportedError: an activation or RoPE scaling that the decoder does not compute.
    """
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise UnsupportedError(
            f"config.json gives hidden_act '{activation}'; this family computes silu only."
        )
    if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        raise UnsupportedError(
            f"config.json gives sliding_window = {config['sliding_window']}; attention windows "
            "are not supported yet. Set it to null in config.json only if the model was trained "
            "without one."
        )
    heads = whole(config, "num_attention_heads")
    hidden = whole(config, "hidden_size")
    head_dim = whole(config, "head_dim", max(1, hidden // heads))
    norm = NormSpec(number(config, "rms_norm_eps", _EPSILON))
    bias = bool(config.get("attention_bias"))
    attention = AttentionSpec(
        num_attention_heads=heads,
        num_key_value_heads=whole(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        norm=norm,
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = MLPSpec(whole(config, "intermediate_size"), norm=norm, bias=bool(config.get("mlp_bias")))
    return DecoderSpec(
        model_type=str(config["model_type"]),
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=whole(config, "max_position_embeddings", _POSITIONS),
        layers=whole(config, "num_hidden_layers") * (LayerSpec(attention, mlp),),
        norm=norm,
        rotary=(rope_spec(config, head_dim),),
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
    )


def rope_spec(config: Mapping[str, Any], dim: int) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Args:
        config: `config.json`.
        dim: How many numbers of a head are rotated.

    Raises:
        CheckpointError: a parameter of the scaling is missing or of another type.
        UnsupportedError: a scaling that the decoder does not compute.
    """
    values = {**table(config, "rope_scaling"), **table(config, "rope_parameters")}
    kind = values.get("rope_type") or values.get("type") or "default"
    for known in get_args(RopeKind):
        if kind == known:
            return _rope_spec(known, dim, values, config)
    raise UnsupportedError(
        f"config.json scales RoPE by '{kind}'; supported are {', '.join(get_args(RopeKind))}."
    )


def _rope_spec(
    kind: RopeKind, dim: int, values: dict[str, Any], config: Mapping[str, Any]
) -> RopeSpec:
    scaled = kind in ("linear", "llama3")
    by_band = kind == "llama3"
    trained = "original_max_position_embeddings"
    positions = whole(config, "max_position_embeddings", _POSITIONS)
    where = f"The {kind} scaling of RoPE in config.json"
    low = number(values, "low_freq_factor", where=where) if by_band else 1.0
    high = number(values, "high_freq_factor", where=where) if by_band else 4.0
    if not high > low:
        raise CheckpointError(
            f"config.json gives high_freq_factor = {high} and low_freq_factor = {low}; the first "
            "must be the larger. Download or save the model again."
        )
    return RopeSpec(
        dim=dim,
        theta=number(values, "rope_theta", number(config, "rope_theta", _THETA)),
        kind=kind,
        factor=number(values, "factor", where=where) if scaled else 1.0,
        low_freq_factor=low,
        high_freq_factor=high,
        # As transformers looks it up: beside the sizes first, then among the scaling's parameters.
        original_max_position_embeddings=whole(config, trained, whole(values, trained, positions)),
    )


def stored(spec: DecoderSpec) -> dict[str, Stored]:
    """Return what every parameter is made of: one tensor each, named as in the decoder."""
    inner = ["embed_tokens.weight", "norm.weight"]
    for index, layer in enumerate(spec.layers):
        inner += [f"layers.{index}.{part}" for part in _parts(layer)]
    found = {name: Stored((f"model.{name}",)) for name in inner}
    if not spec.tie_word_embeddings:
        found["lm_head.weight"] = Stored(("lm_head.weight",))
    return found


def _parts(layer: LayerSpec) -> Iterator[str]:
    """Yield the parameters of a layer."""
    attention, mlp = layer.mixer, layer.feed_forward
    biased = {f"mlp.{kind}_proj": mlp.bias for kind in ("gate", "up", "down")}
    biased |= {f"self_attn.{kind}_proj": attention.qkv_bias for kind in "qkv"}
    biased["self_attn.o_proj"] = attention.out_bias
    yield from (f"{linear}.weight" for linear in biased)
    yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
    yield from (f"{linear}.bias" for linear, has_bias in biased.items() if has_bias)


# Old checkpoints store RoPE frequencies; a tied head may be written out beside its table.
FAMILY = Family(spec, stored, ignored=("*.rotary_emb.inv_freq", "lm_head.weight"))
