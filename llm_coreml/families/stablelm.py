"""StableLM: LayerNorm, partly rotated heads, and layers side by side where it is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import Stacked
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, QKNormSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import LAYER_NORM, Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
}
_NAMES = Names(
    modules={
        "self_attn.q_norm": "self_attn.q_layernorm.norms.*",
        "self_attn.k_norm": "self_attn.k_layernorm.norms.*",
    },
    values=lambda spec, layer: {
        "self_attn.q_norm": Stacked(layer.mixer.num_attention_heads),
        "self_attn.k_norm": Stacked(layer.mixer.num_key_value_heads),
    },
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a StableLM `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config}, Keys(eps="layer_norm_eps"), LAYER_NORM)
    own, parallel = flag(config, "qk_layernorm"), flag(config, "use_parallel_residual")
    attention = replace(
        read.attention,
        qkv_bias=flag(config, "use_qkv_bias"),
        qk_norm=QKNormSpec(read.norm.eps, kind="layer", own=True) if own else None,
    )
    mlp = replace(read.mlp, norm=None if parallel else read.norm)
    layer = LayerSpec(attention, mlp, parallel)
    return read.decoder(read.count * (layer,), (read.rope_of(0.25),))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
