"""The first GPT: GPT-2's parts, with norms behind each part instead of before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from llm_coreml.checkpoint.weights_view import Stored
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import gpt2
from llm_coreml.families.dense import LAYER_NORM, Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import shown, word
from llm_coreml.families.gpt import DEFAULTS, IGNORED, KEYS, MODULES, no_notes, norms_behind
from llm_coreml.families.names import Names, stored

# What transformers calls the activations that it has for this family: its GELU is that by tanh.
_KINDS = MappingProxyType({"relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu_new"})
_DEFAULTS = {**DEFAULTS, "vocab_size": 40478, "n_positions": 512, "afn": "gelu"}
_NAMED = {
    **MODULES,
    "embed_tokens": "tokens_embed",
    "embed_positions": "positions_embed",
    "attention_out_norm": "ln_1",
    "mlp_out_norm": "ln_2",
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read the `config.json` of a first GPT.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    kind = word(known, "afn", "gelu")
    if kind not in _KINDS:
        raise UnsupportedError(
            f"config.json gives afn {shown(kind)}; supported are {', '.join(_KINDS)}."
        )
    # It has no other width of the MLP.
    read = Dense({**known, "activation_function": _KINDS[kind], "n_inner": None}, KEYS, LAYER_NORM)
    attention = replace(read.attention, rope=None, qkv_bias=True, out_bias=True)
    layers = norms_behind(read.count * (LayerSpec(attention, read.plain_mlp),))
    return replace(read.decoder(layers, ()), learned_positions=read.positions)


def _stored(spec: DecoderSpec) -> dict[str, Stored]:
    modules = {**_NAMED, "norm": f"h.{len(spec.layers) - 1}.ln_2"}
    return stored(spec, Names("transformer.", "h", modules=modules, values=gpt2.columns))


FAMILY = Family(spec, _stored, no_notes, ignored=IGNORED)
