"""OLMo 3: OLMo 2 with windows on three layers of four, and scaled rotary tables on the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, number
from llm_coreml.families.layered import FULL, SLIDING, table_of, turns
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
}
_THETA = 500000.0
NAMES = Names(
    modules={
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an OLMo 3 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read, bias = Dense({**_DEFAULTS, **config}), flag(config, "attention_bias")
    attention = replace(
        read.attention,
        norm=None,
        out_norm=read.norm,
        qk_norm=QKNormSpec(read.norm.eps, over="all"),
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = replace(read.mlp, norm=None, out_norm=read.norm)
    # A base beside the sizes is that of layers that see all; transformers looks at it once.
    thetas = {FULL: number(config, "rope_theta", _THETA), SLIDING: _THETA}
    rotary = [
        table_of(config, read.head_dim, read.positions, kind, theta)
        for kind, theta in thetas.items()
    ]
    seen = turns(
        {**read.config, "sliding_window_pattern": 4}, read.count, sliding_window(read.config), 4
    )
    layers = [
        LayerSpec(replace(attention, window=window, rope=0 if window is None else 1), mlp)
        for window in seen
    ]
    return read.decoder(layers, rotary)


FAMILY = Family(spec, lambda spec: stored(spec, NAMES), rope_notes, ignored=llama.FAMILY.ignored)
