"""GPT-J: attention and a plain MLP side by side, a part of each head rotated by neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families.arrangements import interleaved
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import whole
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_spec

KEYS = Keys(
    hidden="n_embd",
    layers="n_layer",
    heads="n_head",
    inner="n_inner",
    positions="n_positions",
    eps="layer_norm_epsilon",
    activation="activation_function",
)
# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
NAMES = Names(
    trunk="transformer.",
    layers="h",
    modules={
        "embed_tokens": "wte",
        "norm": "ln_f",
        "input_layernorm": "ln_1",
        **{f"self_attn.{kind}_proj": f"attn.{kind}_proj" for kind in "qkv"},
        "self_attn.o_proj": "attn.out_proj",
        "mlp.up_proj": "mlp.fc_in",
        "mlp.down_proj": "mlp.fc_out",
    },
    values=interleaved,
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT-J `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config}, KEYS, LAYER_NORM)
    layer = LayerSpec(read.attention, replace(read.plain_mlp, norm=None), parallel=True)
    # Without any scaling, whatever the file says.
    rope = rope_spec({}, whole(read.config, "rotary_dim"), read.positions)
    return replace(read.decoder(read.count * (layer,), (rope,)), head_bias=True)


IGNORED = ("*.attn.bias", "*.attn.masked_bias", "*.attn.causal_mask", "*.embed_positions")
FAMILY = Family(spec, lambda spec: stored(spec, NAMES), lambda _: [], ignored=IGNORED)
