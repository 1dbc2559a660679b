"""OPT: learned positions, the first two of which stand for padding, and plain MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, NormSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families.dense import Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, whole
from llm_coreml.families.gpt import no_notes
from llm_coreml.families.names import Names, stored

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "layer_norm_eps": 1e-5,
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
_KEYS = Keys(
    groups="num_attention_heads",
    inner="ffn_dim",
    eps="layer_norm_eps",
    activation="activation_function",
)
MODULES = {
    "norm": "final_layer_norm",
    "input_layernorm": "self_attn_layer_norm",
    "post_attention_layernorm": "final_layer_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}
_NAMES = Names("model.decoder.", modules=MODULES, first_position=2)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an OPT `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    affine, bias = flag(known, "layer_norm_elementwise_affine"), flag(known, "enable_bias")
    read = Dense(known, _KEYS, NormSpec(kind="layer", gain=affine, bias=affine))
    projected = whole(known, "word_embed_proj_dim", read.hidden) != read.hidden
    behind = not flag(known, "do_layer_norm_before") or flag(known, "_remove_final_layer_norm")
    if projected or behind:
        raise UnsupportedError(
            "config.json projects rows of the token table (word_embed_proj_dim) or norms the "
            "residual stream itself (do_layer_norm_before), as OPT-350M does; give another size."
        )
    attention = replace(read.attention, rope=None, qkv_bias=bias, out_bias=bias)
    layer = LayerSpec(attention, replace(read.plain_mlp, bias=bias))
    plain = read.decoder(read.count * (layer,), ())
    return replace(plain, learned_positions=read.positions)


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), no_notes, ignored=("lm_head.weight",))
