"""GPT-Neo: learned positions, scores that are not scaled, and every second layer a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import CheckpointError
from llm_coreml.families import gpt
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import shown, whole
from llm_coreml.families.names import Names, stored

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **gpt.DEFAULTS,
    "hidden_size": 2048,
    "num_layers": 24,
    "num_heads": 16,
    "window_size": 256,
    "max_position_embeddings": 2048,
    "attention_types": [[["global", "local"], 12]],
}
_KEYS = Keys(
    layers="num_layers",
    heads="num_heads",
    groups="num_heads",
    eps="layer_norm_epsilon",
    activation="activation_function",
)
_NAMES = Names(
    "transformer.",
    "h",
    modules={
        **gpt.MODULES,
        **{f"self_attn.{kind}_proj": f"attn.attention.{kind}_proj" for kind in "qkv"},
        "self_attn.o_proj": "attn.attention.out_proj",
    },
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT-Neo `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    read = Dense(known, _KEYS, LAYER_NORM)
    window = whole(known, "window_size")
    attention = replace(read.attention, rope=None, scale=1.0, out_bias=True)
    layers = [
        LayerSpec(replace(attention, window=window if local else None), read.plain_mlp)
        for local in _local(known, read.count)
    ]
    return replace(read.decoder(layers, ()), learned_positions=read.positions)


def _local(config: Mapping[str, Any], count: int) -> list[bool]:
    """Return which layers have a window, of a list of kinds and how often each is repeated."""
    told: Any = config["attention_types"] or _DEFAULTS["attention_types"]
    kinds: list[Any] = []
    try:
        for names, times in told:
            kinds += list(names) * min(int(times), count)
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != count or any(kind not in ("global", "local") for kind in kinds):
        raise CheckpointError(
            f"config.json gives attention_types = {shown(told)}; it must name global or local for "
            f"each of {count} layers. Download or save the model again."
        )
    return [kind == "local" for kind in kinds]


FAMILY = Family(
    spec,
    lambda spec: stored(spec, _NAMES),
    gpt.no_notes,
    ignored=("*.attention.bias", "*.attention.masked_bias", *gpt.IGNORED),
)
