"""BitNet b1.58: Llama with squared ReLU, and norms before the last matrix of each part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import table
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 30,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "hidden_act": "relu2",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_NAMES = Names(
    modules={
        "self_attn.inner_norm": "self_attn.attn_sub_norm",
        "mlp.inner_norm": "mlp.ffn_sub_norm",
    }
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a BitNet `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    attention = replace(read.biased_attention, inner_norm=read.norm)
    return read.alike(LayerSpec(attention, replace(read.mlp, inner_norm=read.norm)))


def notes(config: Mapping[str, Any]) -> list[str]:
    """Return what a BitNet `config.json` says that is read otherwise than it looks."""
    found, method = rope_notes(config), table(config, "quantization_config").get("quant_method")
    if method == "bitnet":
        found.append(
            "BitNet's code rounds what each matrix multiplies to 8 bits, token by token; a Core ML "
            "program multiplies fp16, which is nearer to the model before that rounding."
        )
    return found


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), notes, ignored=llama.FAMILY.ignored)
