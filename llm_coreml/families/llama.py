"""Llama 2, 3, 3.1 and 3.2, and everything else that uses `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, shown
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent; a null is no default of a size.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    }
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Llama `config.json`; transformers' own Llama has no attention window.

    Raises:
        CheckpointError: a field is of another type or out of range, or makes no sense.
        UnsupportedError: an activation or RoPE scaling that the decoder does not compute.
    """
    read = Dense({**DEFAULTS, **config})
    mlp = replace(read.mlp, bias=flag(config, "mlp_bias"))
    return read.alike(LayerSpec(read.biased_attention, mlp))


def notes(config: Mapping[str, Any]) -> list[str]:
    """Return what a Llama `config.json` says that is read otherwise than it looks."""
    found = rope_notes(config)
    window = config.get("sliding_window")
    if window is not None:
        found.append(
            f"config.json gives sliding_window = {shown(window)}, which transformers' Llama does "
            "not have; attention sees the whole context here as there."
        )
    return found


# Old checkpoints store RoPE frequencies; a tied head may be written out beside its table.
FAMILY = Family(spec, stored, notes, ignored=("*.rotary_emb.inv_freq", "lm_head.weight"))
