"""The table of families: configurations of each, whose models `transformers` makes.

A family's test is its lines here. A file `config.json` is all that both sides share: `transformers`
builds its model from it, and writes the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tiny import randomize, save

ABSENT = object()
SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
)
# Beyond the length that the model was trained on.
SHORT = 32
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": SHORT,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@dataclass(frozen=True)
class Entry:
    """What is tried of a family.

    Attributes:
        cases: Changes of `sizes`, at least three.
        sizes: What a small `config.json` says.
        unread: Spellings of `test_reading.py` that transformers itself can make no model of.
    """

    cases: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    unread: frozenset[str] = frozenset()


_NO_HEADS = frozenset({"no key/value heads", "null head_dim"})
_SWITCHED = frozenset({"layers in turn"})
TABLE: dict[str, Entry] = {
    "llama": Entry(
        {
            "gqa-4-2": {},
            "gqa-6-2": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
            "one-kv-head": {"num_attention_heads": 8, "num_key_value_heads": 1},
            "mha": {"num_key_value_heads": 4},
            "head-dim-48": {"hidden_size": 96, "head_dim": 48},
            "tied": {"tie_word_embeddings": True},
            "attention-bias": {"attention_bias": True},
            "mlp-bias": {"mlp_bias": True},
            "eps-1e-6": {"rms_norm_eps": 1e-6},
            "three-layers": {"num_hidden_layers": 3, "tie_word_embeddings": True},
            "gelu": {"hidden_act": "gelu_new"},
            "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            "rope-linear": {"rope_parameters": LINEAR, "max_position_embeddings": SHORT},
            "rope-dynamic": {"rope_parameters": DYNAMIC},
            "rope-llama3": {"rope_parameters": LLAMA3},
        }
    ),
    "mistral": Entry(
        {
            "whole": {},
            "window": {"sliding_window": 9, "head_dim": 24},
            "windows-in-turn": {
                "sliding_window": 12,
                "layer_types": ["full_attention", "sliding_attention"],
                "head_dim": 16,
            },
        }
    ),
    "qwen2": Entry(
        {
            "gqa": {},
            "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
            "window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "window-everywhere": {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 0,
            },
            "rope-linear": {"rope_parameters": LINEAR, "max_position_embeddings": SHORT},
        },
        unread=_NO_HEADS | _SWITCHED,
    ),
    "qwen3": Entry(
        {
            "wide-heads": {},
            "tied": {"tie_word_embeddings": True, "head_dim": 16},
            "bias": {"attention_bias": True, "head_dim": 24},
            "window": {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"],
                "head_dim": 16,
            },
            "rope-linear": {"rope_parameters": LINEAR, "max_position_embeddings": SHORT},
        },
        unread=_NO_HEADS | _SWITCHED,
    ),
}
CASES = [(family, name) for family, entry in TABLE.items() for name in entry.cases]


def write_config(folder: Path, model_type: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Write a family's small `config.json`, changed by `changes`, and return what it holds."""
    config = {"model_type": model_type, **TABLE[model_type].sizes, **changes}
    config = {key: value for key, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def their_model(folder: Path) -> Any:
    """Return the model that transformers makes of a `config.json`, with random fp32 weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.dtype = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert model.dtype == torch.float32
    return randomize(model)


def checkpoint(folder: Path, model_type: str, changes: Mapping[str, Any]) -> Any:
    """Write a checkpoint and return the model of transformers, the file as it was given."""
    write_config(folder, model_type, changes)
    given = (folder / "config.json").read_bytes()
    theirs = their_model(folder)
    save(theirs, folder)
    (folder / "config.json").write_bytes(given)
    return theirs
