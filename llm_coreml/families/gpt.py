"""What GPT-2 and those that were written after it share: names, and refusals.

read = Dense({**DEFAULTS, **config}, KEYS, LAYER_NORM)
check_alone(config)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from llm_coreml.checkpoint.value_maps import Waves
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families.dense import Dense, Keys
from llm_coreml.families.fields import flag, whole

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
# Far beyond those published, and no large table.
_COMPUTED = 2**16
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


def norms_behind(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Return layers that norm the residual stream behind each part, and not what the part reads.

    The last norm is left out: it is that of the decoder.
    """
    found = [
        LayerSpec(
            replace(layer.mixer, norm=None, out_norm=layer.mixer.norm),
            replace(layer.feed_forward, norm=None, out_norm=layer.feed_forward.norm),
            sums_normed=True,
        )
        for layer in layers
    ]
    last = replace(found[-1].feed_forward, out_norm=None)
    return [*found[:-1], replace(found[-1], feed_forward=last)]


def computed_positions(read: Dense) -> int:
    """Return how many positions have a row, where no file bounds their table."""
    return whole(read.config, read.keys.positions, most=_COMPUTED)


def waves(spec: DecoderSpec, period: int, first: int = 0) -> Waves:
    """Return the table of positions of a decoder that has one and stores none, see `Waves`."""
    return Waves(spec.learned_positions or 1, spec.hidden_size, max(1, period), first)
