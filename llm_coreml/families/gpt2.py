"""GPT-2 and its many relatives: learned positions, and matrices that are stored `[in, out]`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import Columns, Rows, Transposed, ValueMap
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families.arrangements import qkv_rows
from llm_coreml.families.dense import LAYER_NORM, Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.gpt import DEFAULTS, IGNORED, KEYS, MODULES, check_alone, no_notes
from llm_coreml.families.names import Names, stored


def columns(spec: DecoderSpec, layer: LayerSpec) -> dict[str, ValueMap]:
    """Return how the matrices of a layer are stored: `[in, out]`, those of attention as one."""
    size, found = spec.hidden_size, dict[str, ValueMap]()
    for at, kind in enumerate("qkv"):
        found[f"self_attn.{kind}_proj.weight"] = Columns(at * size, (at + 1) * size, of=3 * size)
        found[f"self_attn.{kind}_proj.bias"] = Rows(at * size, (at + 1) * size, of=3 * size)
    plain = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    return found | {f"{name}.weight": Transposed() for name in plain}


_NAMES = Names("transformer.", "h", modules=dict(MODULES), values=columns)
# What llama.cpp's files are read as: each matrix the other way round.
_MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_TURNED = Names(
    "transformer.",
    "h",
    modules={n: f"{their}.T" if their in _MATRICES else their for n, their in MODULES.items()},
    values=lambda spec, layer: qkv_rows(layer),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT-2 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    check_alone(config)
    known = {**DEFAULTS, **config}
    read = Dense(known, KEYS, LAYER_NORM)
    attention = replace(read.attention, rope=None, qkv_bias=True, out_bias=True)
    own = 1 / math.sqrt(read.head_dim) if known.get("scale_attn_weights") is not False else 1.0
    falling = flag(config, "scale_attn_by_inverse_layer_idx")
    layers = [
        LayerSpec(replace(attention, scale=own / (place if falling else 1)), read.plain_mlp)
        for place in range(1, read.count + 1)
    ]
    return replace(read.decoder(layers, ()), learned_positions=read.positions)


FAMILY = Family(
    spec,
    lambda spec: stored(spec, _NAMES),
    no_notes,
    ignored=IGNORED,
    other_names=(lambda spec: stored(spec, _TURNED),),
)
