"""Llama 2, 3, 3.1 and 3.2, and everything else that uses `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, RopeKind, RopeSpec
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.families.family import Family

_ROPE_KINDS: dict[str, RopeKind] = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Llama `config.json`.

    Raises:
        CheckpointError: a size is missing or makes no sense.
        UnsupportedError: an activation or RoPE scaling that the decoder does not compute.
    """
    activation = config.get("hidden_act", "silu")
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
    heads = require(config, "num_attention_heads")
    hidden = require(config, "hidden_size")
    return DecoderSpec(
        model_type=str(config["model_type"]),
        vocab_size=require(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=require(config, "intermediate_size"),
        num_hidden_layers=require(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope_spec(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def rope_spec(config: Mapping[str, Any]) -> RopeSpec:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    values: dict[str, Any] = dict(config.get("rope_scaling") or {})
    values.update(config.get("rope_parameters") or {})
    kind = str(values.get("rope_type", values.get("type", "default")))
    if kind not in _ROPE_KINDS:
        raise UnsupportedError(
            f"config.json scales RoPE by '{kind}'; supported are {', '.join(_ROPE_KINDS)}."
        )
    trained = values.get("original_max_position_embeddings") or config.get(
        "max_position_embeddings", 2048
    )
    try:
        return RopeSpec(
            theta=float(values.get("rope_theta") or config.get("rope_theta") or 10000.0),
            kind=_ROPE_KINDS[kind],
            factor=float(values["factor"]) if kind in ("linear", "llama3") else 1.0,
            low_freq_factor=float(values["low_freq_factor"]) if kind == "llama3" else 1.0,
            high_freq_factor=float(values["high_freq_factor"]) if kind == "llama3" else 4.0,
            original_max_position_embeddings=int(trained),
        )
    except KeyError as error:
        raise CheckpointError(
            f"config.json scales RoPE by '{kind}' but gives no {error.args[0]} for it."
        ) from None


def require(config: Mapping[str, Any], key: str) -> int:
    """Return the whole number `config[key]`.

    Raises:
        CheckpointError: it is missing.
    """
    if key not in config:
        raise CheckpointError(f"config.json has no {key}; a {config['model_type']} model needs it.")
    value: int = config[key]
    return value


def tensor_names(spec: DecoderSpec) -> dict[str, str]:
    """Return decoder name -> checkpoint name of every parameter."""
    names = {"embed_tokens.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    linears = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    linears += [f"self_attn.{kind}_proj" for kind in "qkvo"]
    parts = [f"{linear}.weight" for linear in linears]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    for linear in linears:
        if spec.mlp_bias if linear.startswith("mlp") else spec.attention_bias:
            parts.append(f"{linear}.bias")
    for layer in range(spec.num_hidden_layers):
        for part in parts:
            names[f"layers.{layer}.{part}"] = f"model.layers.{layer}.{part}"
    if not spec.tie_word_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    return names


# Old checkpoints store RoPE frequencies; a tied head may be written out beside its table.
FAMILY = Family(spec, tensor_names, ignored=("*.rotary_emb.inv_freq", "lm_head.weight"))
