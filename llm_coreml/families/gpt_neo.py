"""GPT-Neo: learned positions, unscaled scores, and windows in every second layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import CheckpointError
from llm_coreml.families import gpt_bigcode
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import shown, whole
from llm_coreml.families.names import Names, stored

_KEYS = Keys(
    layers="num_layers",
    heads="num_heads",
    eps="layer_norm_epsilon",
    activation="activation_function",
)
# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
    "hidden_size": 2048,
    "num_layers": 24,
    "num_heads": 16,
    "window_size": 256,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
_ATTENTION = {f"self_attn.{kind}_proj": f"attn.attention.{kind}_proj" for kind in "qkv"}
_NAMES = Names(
    trunk="transformer.",
    layers="h",
    modules={
        **gpt_bigcode.MODULES,
        **_ATTENTION,
        "self_attn.o_proj": "attn.attention.out_proj",
    },
)
_IGNORED = ("*.attn.attention.bias", "*.attn.attention.masked_bias", "lm_head.weight")


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT-Neo `config.json`.

    Raises:
        CheckpointError: see `llama.spec`; also for kinds of attention that are not one per layer.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config}, _KEYS, LAYER_NORM)
    attention = replace(read.attention, rope=None, scale=1.0, out_bias=True)
    widths = {"global": None, "local": whole(read.config, "window_size")}
    layers = [
        LayerSpec(replace(attention, window=widths[kind]), read.plain_mlp) for kind in _kinds(read)
    ]
    return replace(read.decoder(layers, ()), learned_positions=read.positions)


def _kinds(read: Dense) -> list[str]:
    """Return each layer's kind of attention, `global` or `local`."""
    given = read.config.get("attention_types") or [[["global", "local"], 12]]
    try:
        kinds = [str(kind) for part, times in given for kind in part * min(times, read.count)]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != read.count or not {"global", "local"}.issuperset(kinds):
        raise CheckpointError(
            f"config.json gives attention_types = {shown(given)}; it must name global or local for "
            f"each of {read.count} layers. Download or save the model again."
        )
    return kinds


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), lambda _: [], ignored=_IGNORED)
