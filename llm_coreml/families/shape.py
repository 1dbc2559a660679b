"""What kind of model a `config.json` describes, for a model_type that has no family here.

shape_of({"model_type": "mixtral", "num_local_experts": 8, ...})
# Shape('a mixture of experts (num_local_experts = 8)', dense=False)

Told from the fields, whatever the name: a new architecture is most often a known one with a few
parts exchanged, and a similar name says nothing ('mixtral' is no 'mistral').
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from llm_coreml.printable import printable

# Fields that only one kind of model has, in the order in which they tell it.
_KINDS = (
    ("an encoder with a decoder", ("is_encoder_decoder", "encoder_layers", "num_decoder_layers")),
    (
        "a mixture of experts",
        (
            "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts",
            "num_experts_per_tok", "num_experts_per_token", "moe_intermediate_size",
        ),
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
)  # fmt: skip
# What a dense decoder may have beside heads, a gated layer and rotary embeddings: what its tensors
# show, and what nothing but a field tells.
_SEEN = (
    ("learned positions", ("n_positions", "word_embed_proj_dim")),
    ("norms of queries and keys", ("use_qk_norm", "qk_layernorm", "qk_norm", "use_qk_layernorm")),
    ("an input of its own for each layer", ("hidden_size_per_layer_input",)),
    ("biases", ("attention_bias", "qkv_bias", "use_bias", "bias", "mlp_bias")),
)
_UNSEEN = (
    ("positions as a slope (ALiBi)", ("alibi",)),
    ("capped logits", ("final_logit_softcapping", "attn_logit_softcapping")),
    ("partly rotated heads", ("partial_rotary_factor", "rotary_pct", "rotary_dim", "rotary_ndims")),
    ("layers without rotary embeddings", ("no_rope_layers", "no_rope_layer_interval")),
    (
        "scaled streams",
        (
            "embedding_multiplier", "residual_multiplier", "scale_emb", "mup_width", "scale_depth",
            "dim_model_base", "logits_scaling", "logit_scale", "attention_multiplier",
        ),
    ),
    ("attention and feed-forward layers side by side", ("use_parallel_residual", "parallel_attn")),
    ("norms with a mean", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
    ("keys and values shared between layers", ("num_kv_shared_layers",)),
    ("layers with settings of their own", ("per_layer_config",)),
)  # fmt: skip
# Each size by the names that it has.
_SIZES = (
    ("hidden_size", "n_embd", "d_model"),
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    ("num_attention_heads", "n_head", "n_heads"),
)


@final
@dataclass(frozen=True)
class Shape:
    """What a configuration looks like.

    Attributes:
        told: In words, with the field that shows it.
        dense: It is a dense decoder, which may have a family here that is near to it.
    """

    told: str
    dense: bool


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Say what kind of model `config` describes; its values are not trusted, only printed."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        found = shape_of(inner)
        return Shape(f"a model of several modalities around {found.told}", found.dense)
    shown = _first(config, ("vision_config", "audio_config"))
    if shown:
        return Shape(f"a model of several modalities ({shown})", False)
    for kind, keys in _KINDS:
        shown = _first(config, keys)
        if shown:
            return Shape(f"{kind} ({shown})", False)
    sizes = [next((config[key] for key in keys if config.get(key)), None) for keys in _SIZES]
    if None in sizes:
        return Shape("of a kind that its fields do not tell", False)
    return Shape(", ".join(_parts(config, sizes[-1])), True)


def changes_values(key: str) -> bool:
    """Say whether a field is known to change what a model computes, its tensors being the same."""
    return any(key in keys for _, keys in _UNSEEN)


def _parts(config: Mapping[str, Any], heads: object) -> Iterator[str]:
    """Yield what a dense decoder is made of."""
    groups = config.get("num_key_value_heads")
    grouped = groups is not None and groups != heads
    yield "a dense decoder"
    yield f"{_value(heads)} heads" + (f" on {_value(groups)} of keys and values" if grouped else "")
    window = config.get("sliding_window")
    if window is not None:
        yield f"a sliding window of {_value(window)}"
    names = ("hidden_act", "hidden_activation", "activation_function")
    activation = next((config[name] for name in names if config.get(name)), None)
    if activation not in (None, "silu", "swish"):
        yield f"an activation of {_value(activation)}"
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        yield "kinds of attention that change from layer to layer (layer_types)"
    for part, keys in (*_SEEN, *_UNSEEN):
        shown = _first(config, keys)
        if shown:
            yield f"{part} ({shown})"


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
