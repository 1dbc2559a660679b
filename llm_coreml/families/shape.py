"""What kind of model a `config.json` describes, for a model_type that has no family here.

shape_of({"model_type": "mixtral", "num_local_experts": 8, ...})
# Shape('a mixture of experts (num_local_experts = 8)', None)

Told from the fields, whatever the name: a new architecture is most often a known one with a few
parts exchanged, and a similar name says nothing ('mixtral' is no 'mistral').
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from llm_coreml.printable import printable

# Fields that only one kind of model has, in the order in which they tell it.
_KINDS = (
    ("a model of several modalities", ("vision_config", "audio_config", "text_config")),
    ("an encoder with a decoder", ("is_encoder_decoder", "encoder_layers", "num_decoder_layers")),
    (
        "a mixture of experts",
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_config"),
    ),
    (
        "a model with layers of state in the place of attention",
        (
            "ssm_cfg", "state_size", "mamba_d_state", "ssm_state_size", "time_step_rank",
            "linear_num_value_heads", "conv_L_cache", "lru_width", "rescale_every",
        ),
    ),
    ("a decoder with latent attention", ("kv_lora_rank", "q_lora_rank")),
    ("an encoder", ("type_vocab_size",)),
    ("a decoder with learned positions", ("n_positions", "n_embd", "word_embed_proj_dim")),
)  # fmt: skip
# What a dense decoder may have that the families here do not compute.
_PARTS = (
    ("norms of queries and keys", ("use_qk_norm", "qk_layernorm", "qk_norm")),
    ("capped logits", ("final_logit_softcapping", "attn_logit_softcapping")),
    ("partly rotated heads", ("partial_rotary_factor", "rotary_pct", "rotary_dim")),
    ("scaled streams", ("embedding_multiplier", "residual_multiplier", "scale_emb", "mup_width")),
    ("biases", ("attention_bias", "qkv_bias", "use_bias", "bias")),
)
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@final
@dataclass(frozen=True)
class Shape:
    """What a configuration looks like.

    Attributes:
        told: In words, with the field that shows it.
        nearest: The family here whose fields it has, None where it is another kind of model.
    """

    told: str
    nearest: str | None


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Say what kind of model `config` describes; its values are not trusted, only printed."""
    for kind, keys in _KINDS:
        shown = _first(config, keys)
        if shown:
            return Shape(f"{kind} ({shown})", None)
    if any(config.get(key) is None for key in _NEEDED):
        return Shape("of a kind that its fields do not tell", None)
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    grouped = groups is not None and groups != heads
    parts = [
        "a dense decoder",
        f"{_value(heads)} heads" + (f" on {_value(groups)} of keys and values" if grouped else ""),
    ]
    window = config.get("sliding_window")
    if window is not None:
        parts.append(f"a sliding window of {_value(window)}")
    activation = config.get("hidden_act") or config.get("hidden_activation")
    if activation not in (None, "silu", "swish"):
        parts.append(f"an activation of {_value(activation)}")
    if (
        isinstance(config.get("layer_types"), list)
        and len(set(map(str, config["layer_types"]))) > 1
    ):
        parts.append("kinds of attention that change from layer to layer (layer_types)")
    parts += [f"{part} ({shown})" for part, keys in _PARTS if (shown := _first(config, keys))]
    return Shape(", ".join(parts), "llama" if window is None else "mistral")


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return the first of `keys` that is set, with its value."""
    for key in keys:
        value = config.get(key)
        if value:
            simple = isinstance(value, (bool, int, float, str))
            return f"{key} = {_value(value)}" if simple else key
    return None


def _value(value: object) -> str:
    return printable(str(value), 30)
