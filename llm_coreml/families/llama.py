"""Llama 2, 3, 3.1 and 3.2, and everything else that uses `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from llm_coreml.checkpoint.weights_view import Stored
from llm_coreml.decoder.spec import AttentionSpec, DecoderSpec, LayerSpec, MLPSpec, NormSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families.family import Family
from llm_coreml.families.fields import LARGEST_POSITION, flag, number, shown, table, whole, word
from llm_coreml.families.rotary import rope_notes, rope_spec

# transformers' own defaults where config.json is silent; a null is no default of a size.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    }
)
_EPSILON = 1e-6
# Eight times those of the deepest one published; each takes a millisecond to lay out.
_LAYERS = 1024


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Llama `config.json`; transformers' own Llama has no attention window.

    Raises:
        CheckpointError: a field is of another type or out of range, or makes no sense.
        UnsupportedError: an activation or RoPE scaling that the decoder does not compute.
    """
    biases = (flag(config, "attention_bias"), flag(config, "mlp_bias"))
    return llama_spec({**DEFAULTS, **config}, *biases)


def llama_spec(
    config: Mapping[str, Any], attention_bias: bool = False, mlp_bias: bool = False
) -> DecoderSpec:
    """Read the `config.json` of a family with Llama's graph, without attention windows.

    Args:
        config: With the family's defaults for sizes.
        attention_bias: The projections of attention have biases.
        mlp_bias: Those of the feed-forward layers have.

    Raises:
        CheckpointError: as `spec`.
        UnsupportedError: as `spec`.
    """
    activation = word(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(
            f"config.json gives hidden_act {shown(activation)}; this family computes silu only."
        )
    if table(config, "per_layer_config"):
        raise UnsupportedError(
            "config.json gives single layers settings of their own (per_layer_config); the layers "
            "of this family are all alike."
        )
    heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    head_dim = whole(config, "head_dim", max(1, hidden // heads))
    norm = NormSpec(number(config, "rms_norm_eps", _EPSILON, most=1.0))
    attention = AttentionSpec(
        num_attention_heads=heads,
        num_key_value_heads=whole(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        norm=norm,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
    )
    mlp = MLPSpec(whole(config, "intermediate_size"), norm=norm, bias=mlp_bias)
    positions = whole(config, "max_position_embeddings", most=LARGEST_POSITION)
    return DecoderSpec(
        model_type=str(config["model_type"]),
        vocab_size=whole(config, "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=positions,
        layers=whole(config, "num_hidden_layers", most=_LAYERS) * (LayerSpec(attention, mlp),),
        norm=norm,
        rotary=(rope_spec(config, head_dim, positions),),
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
    )


def notes(config: Mapping[str, Any]) -> list[str]:
    """Return what a Llama `config.json` says that is read otherwise than it looks."""
    found = rope_notes(config)
    window = config.get("sliding_window")
    if window is not None:
        found.append(
            f"config.json gives sliding_window = {shown(window)}, which transformers' Llama does "
            "not have; attention sees the whole context here as there."
        )
    return found


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
FAMILY = Family(spec, stored, notes, ignored=("*.rotary_emb.inv_freq", "lm_head.weight"))
