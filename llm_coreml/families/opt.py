"""OPT: learned positions, the first two of which stand for padding, and plain MLPs.

OPT-350M norms the residual stream itself, and widens the rows of a narrow token table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import Product
from llm_coreml.checkpoint.weights_view import Stored
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec, NormSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families.dense import Dense, Keys
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, whole
from llm_coreml.families.gpt import no_notes, norms_behind
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
_TRUNK = "model.decoder."
_BEHIND = {
    "attention_out_norm": "self_attn_layer_norm",
    "mlp_out_norm": "final_layer_norm",
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an OPT `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    affine, bias = flag(known, "layer_norm_elementwise_affine"), flag(known, "enable_bias")
    read = Dense(known, _KEYS, NormSpec(kind="layer", gain=affine, bias=affine))
    if flag(known, "_remove_final_layer_norm"):
        raise UnsupportedError(
            "config.json leaves the norm before the head out (_remove_final_layer_norm), as files "
            "of 2022 did; give one saved by a later transformers."
        )
    attention = replace(read.attention, rope=None, qkv_bias=bias, out_bias=bias)
    layer = LayerSpec(attention, replace(read.plain_mlp, bias=bias))
    behind = not flag(known, "do_layer_norm_before")
    layers = norms_behind(read.count * (layer,)) if behind else read.count * (layer,)
    plain = replace(read.decoder(layers, ()), learned_positions=read.positions)
    width = whole(known, "word_embed_proj_dim", read.hidden)
    if width == read.hidden:
        return plain
    if not plain.tie_word_embeddings:
        raise UnsupportedError(
            "config.json has a word_embed_proj_dim of its own and a head that is not tied, which "
            "no published OPT has; give one with tie_word_embeddings."
        )
    return replace(plain, folded_width=width, tie_word_embeddings=False)


def _stored(spec: DecoderSpec) -> dict[str, Stored]:
    last, width = len(spec.layers) - 1, spec.folded_width
    modules = dict(MODULES)
    if spec.layers[0].sums_normed:
        modules |= {**_BEHIND, "norm": f"layers.{last}.final_layer_norm"}
    found = stored(spec, Names(_TRUNK, modules=modules, first_position=2))
    if width is not None:
        for name, matrix in (("embed_tokens", "project_in"), ("lm_head", "project_out")):
            parts = (f"{_TRUNK}embed_tokens.weight", f"{_TRUNK}{matrix}.weight")
            found[f"{name}.weight"] = Stored(parts, Product(width, reads=name != "lm_head"))
    return found


FAMILY = Family(spec, _stored, no_notes, ignored=("lm_head.weight",))
