"""GPT-J: rotated neighbours, attention and a plain MLP side by side behind one norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, RopeSpec
from llm_coreml.families import gpt
from llm_coreml.families.arrangements import interleaved
from llm_coreml.families.dense import LAYER_NORM, Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import whole
from llm_coreml.families.names import Names, stored

# transformers' own defaults where config.json is silent.
DEFAULTS = {
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
MODULES = {
    "embed_tokens": "wte",
    "norm": "ln_f",
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.up_proj": "mlp.fc_in",
    "mlp.down_proj": "mlp.fc_out",
}
_NAMES = Names(
    "transformer.",
    "h",
    modules={**MODULES, **{f"self_attn.{kind}_proj": f"attn.{kind}_proj" for kind in "qkv"}},
    values=interleaved,
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GPT-J `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**DEFAULTS, **config}, gpt.KEYS, LAYER_NORM)
    layer = LayerSpec(read.attention, replace(read.plain_mlp, norm=None), parallel=True)
    # A null rotates all of what is no head: transformers makes no model of it.
    turned = whole(read.config, "rotary_dim")
    rope = RopeSpec(turned, original_max_position_embeddings=read.positions)
    return replace(read.decoder(read.count * (layer,), (rope,)), head_bias=True)


FAMILY = Family(
    spec,
    lambda spec: stored(spec, _NAMES),
    gpt.no_notes,
    ignored=gpt.IGNORED,
)
