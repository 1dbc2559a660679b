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
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Eight pairs of a head of 16 numbers, and six of them.
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 1.9, 2.2, 2.6],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0],
}
SIX = {name: value[:6] if isinstance(value, list) else value for name, value in LONGROPE.items()}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@dataclass(frozen=True)
class Entry:
    """What is tried of a family.

    Attributes:
        cases: Changes of `sizes`, at least three.
        sizes: What a small `config.json` says.
        unread: Spellings of `test_reading.py` that transformers itself can make no model of.
        scalings: The kinds of scaling of RoPE that it can, None for all.
        needed: What a `config.json` must say for transformers to make a model of it at all.
        spelled: Its `config.json` has the names of Llama's, and can be spelled in as many ways.
    """

    cases: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    unread: frozenset[str] = frozenset()
    scalings: frozenset[str] | None = None
    needed: Mapping[str, Any] = field(default_factory=dict)
    spelled: bool = True


_GEMMA_4 = {
    **SIZES,
    "num_hidden_layers": 6,
    "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 9,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 97,
    "final_logit_softcapping": 5.0,
    "tie_word_embeddings": True,
}
_GPT = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "tie_word_embeddings": False,
}
_NO_HEADS = frozenset({"no key/value heads", "null head_dim"})
# Wide heads by default, for which a list of factors is too short.
_LISTS = frozenset({"longrope", "longrope parameters"})
_WIDE = _LISTS | {"null head_dim"}
# What transformers reads as another head size in one place than in another.
_OWN_HEADS = frozenset({"wide heads", "null head_dim", "layers in turn"})
_SWITCHED = frozenset({"layers in turn"})
# Where a table for each kind of layer is built of what is given for all.
_TABLES = frozenset(
    {
        "null head_dim",
        "scaling added",
        "scaling and theta added",
        "empty scaling beside parameters",
        "default scaling beside linear",
    }
)
# Unscaled scores magnify fp32's own noise up to the bound here; cases of the table say nothing of
# RoPE, too.
_NOISY = frozenset({"silent"})
# Where a share of each head is rotated, which these are too long or too short for.
_SHARE = _LISTS | {"proportional parameters"}
# Where transformers has a token of its own for pads, beyond so small a table.
_PADDED = {**SIZES, "pad_token_id": 0}
_GEMMA = {**_PADDED, "head_dim": 16, "sliding_window": 9}
TABLE: dict[str, Entry] = {
    "apertus": Entry(
        {
            "xielu": {"rope_parameters": {**LLAMA3, "rope_theta": 12000000.0}},
            "silent-rope": {"attention_bias": True, "tie_word_embeddings": True},
            "one-kv-head": {"num_key_value_heads": 1, "num_hidden_layers": 3},
        },
        unread=_OWN_HEADS | {"swish"},
    ),
    "arcee": Entry(
        {
            "gqa": {},
            "biases": {"attention_bias": True, "mlp_bias": True},
            "tied": {"tie_word_embeddings": True, "head_dim": 24, "rope_parameters": LINEAR},
        },
    ),
    "biogpt": Entry(
        {
            "scaled": {"tie_word_embeddings": True},
            "unscaled": {"scale_embedding": False, "hidden_act": "gelu_new"},
            "three-layers": {"num_hidden_layers": 3, "num_attention_heads": 8},
        },
        spelled=False,
    ),
    "bitnet": Entry(
        {
            "gqa": {},
            "bias": {"attention_bias": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-3},
            "tied": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        },
        unread=_OWN_HEADS | _NO_HEADS,
    ),
    "bloom": Entry(
        {
            "eight": {"n_head": 8},
            "six": {"n_head": 6, "hidden_size": 96},
            "untied": {"tie_word_embeddings": False, "n_head": 1},
        },
        {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        spelled=False,
    ),
    "codegen": Entry(
        {
            "four-parts": {},
            "wide-mlp": {"n_inner": 80, "rotary_dim": 16},
            "eight-heads": {"n_head": 8, "rotary_dim": 4, "activation_function": "gelu"},
        },
        {**_GPT, "rotary_dim": 8},
        spelled=False,
    ),
    "cohere": Entry(
        {
            "plain": {},
            "norms": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.25},
            "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
            "beyond": {"rope_parameters": YARN, "max_position_embeddings": SHORT},
        },
        {**SIZES, "tie_word_embeddings": True, "logit_scale": 0.5},
        unread=frozenset({"null head_dim"}),
    ),
    "cohere2": Entry(
        {
            "fourth": {"num_hidden_layers": 4, "sliding_window": 9},
            "in-turn": {
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 12,
                "attention_bias": True,
                "logit_scale": 0.25,
            },
            "pattern": {
                "sliding_window": 9,
                "sliding_window_pattern": 2,
                "num_key_value_heads": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
                "tie_word_embeddings": False,
            },
        },
        {**_PADDED, "tie_word_embeddings": True, "logit_scale": 0.5, "sliding_window": 9},
        unread=frozenset({"null head_dim"}),
    ),
    "ctrl": Entry(
        {
            "waves": {},
            "untied": {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
            "eight-heads": {"n_head": 8, "dff": 128, "n_layer": 3},
        },
        {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "dff": 80},
        spelled=False,
    ),
    "cwm": Entry(
        {
            "fourth": {"num_hidden_layers": 5, "rms_norm_eps": 1e-6},
            "in-turn": {
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 12,
                "mlp_bias": True,
                "head_dim": 24,
            },
            "beyond": {
                "rope_parameters": LINEAR,
                "max_position_embeddings": SHORT,
                "tie_word_embeddings": True,
            },
        },
        {**SIZES, "head_dim": 16, "sliding_window": 9},
        unread=_NO_HEADS,
    ),
    "ernie4_5": Entry(
        {
            "wide-heads": {},
            "untied, biases": {"use_bias": True, "head_dim": 16},
            "yarn": {"rope_parameters": YARN, "num_key_value_heads": 4, "head_dim": 24},
            "rope-linear": {
                "rope_parameters": LINEAR,
                "max_position_embeddings": SHORT,
                "head_dim": 16,
            },
        },
        unread=_LISTS,
    ),
    "exaone": Entry(
        {
            "gqa": {"rope_parameters": LLAMA3},
            "own-names": {
                **{"num_hidden_layers": ABSENT, "num_layers": 3},
                **{"rms_norm_eps": ABSENT, "layer_norm_epsilon": 1e-3},
                "activation_function": "gelu_new",
                "tie_word_embeddings": True,
            },
            "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
        },
    ),
    "exaone4": Entry(
        {
            "whole": {"sliding_window": None, "layer_types": 2 * ["full_attention"]},
            "unturned": {"sliding_window": 9, "layer_types": 2 * ["full_attention"]},
            "windows": {"sliding_window": 9, "sliding_window_pattern": 2, "head_dim": 24},
            "fourth": {"sliding_window": 12, "num_hidden_layers": 4, "tie_word_embeddings": True},
        },
        sizes={**SIZES, "sliding_window": 12},
        unread=_NO_HEADS,
    ),
    "falcon": Entry(
        {
            "7b": {"num_kv_heads": ABSENT},
            "40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
            "11b": {
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
                "num_ln_in_parallel_attn": 1,
                "ffn_hidden_size": 80,
            },
            "one-after-the-other": {"parallel_attn": False, "bias": True},
            "each-head-its-own": {"multi_query": False, "tie_word_embeddings": True},
        },
        spelled=False,
    ),
    "gemma": Entry(
        {
            "tied": {"tie_word_embeddings": True},
            "legacy-gelu": {"hidden_act": "gelu", "num_key_value_heads": 1},
            "bias": {"attention_bias": True, "head_dim": 24},
        },
        {**SIZES, "head_dim": 16, "initializer_range": 0.1},
        unread=_NO_HEADS,
    ),
    "gemma2": Entry(
        {
            "in-turn": {"sliding_window": 9, "attn_logit_softcapping": 2.0},
            "caps": {
                "sliding_window": 9,
                "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 2.0,
                "query_pre_attn_scalar": 24,
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
            "no-caps": {
                "sliding_window": 12,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "head_dim": 24,
                "layer_types": ["full_attention", "sliding_attention"],
            },
        },
        sizes=_GEMMA,
        unread=frozenset({"null head_dim"}),
    ),
    "gemma3_text": Entry(
        {
            "old": {
                "num_hidden_layers": 3,
                "sliding_window_pattern": 3,
                "rope_theta": 5000.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "new": {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "full_attention": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.5},
                },
                "layer_types": ["sliding_attention", "full_attention"],
                "max_position_embeddings": SHORT,
                "query_pre_attn_scalar": 24,
                "tie_word_embeddings": True,
            },
            "sixth": {"num_hidden_layers": 6, "head_dim": 24, "final_logit_softcapping": 3.0},
            "global": {"layer_types": 2 * ["full_attention"]},
        },
        sizes=_GEMMA,
        unread=_TABLES,
    ),
    "glm": Entry(
        {
            "wide-heads": {},
            "no-bias": {"attention_bias": False, "head_dim": 16, "tie_word_embeddings": True},
            "quarter": {"partial_rotary_factor": 0.25, "head_dim": 32, "num_key_value_heads": 1},
            "rope-linear": {
                "rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0},
                "max_position_embeddings": SHORT,
                "head_dim": 16,
            },
        },
        sizes=_PADDED,
        unread=_WIDE,
    ),
    "glm4": Entry(
        {
            "wide-heads": {},
            "no-bias": {"attention_bias": False, "head_dim": 16, "tie_word_embeddings": True},
            "rope-yarn": {"rope_parameters": YARN, "max_position_embeddings": SHORT},
        },
        sizes=_PADDED,
        unread=_WIDE,
    ),
    "gpt-sw3": Entry(
        {
            "tied": {"tie_word_embeddings": True},
            "untied": {"n_inner": 80, "n_head": 8},
            "relu": {"activation_function": "relu", "n_layer": 3},
        },
        _GPT,
        spelled=False,
    ),
    "gpt2": Entry(
        {
            "tied": {"tie_word_embeddings": True},
            "untied": {"n_inner": 80, "activation_function": "gelu", "n_head": 8},
            "unscaled": {"scale_attn_weights": False, "layer_norm_epsilon": 1e-3},
            "scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
        },
        _GPT,
        spelled=False,
    ),
    "gpt_bigcode": Entry(
        {
            "one-kv-head": {},
            "each-head-its-own": {"multi_query": False, "tie_word_embeddings": True},
            "wide-mlp": {"n_inner": 80, "activation_function": "relu", "n_layer": 3},
        },
        _GPT,
        spelled=False,
    ),
    "gpt_neo": Entry(
        {
            "in-turn": {},
            "windows-only": {"attention_types": [[["local"], 2]], "window_size": 12},
            "tied": {"tie_word_embeddings": True, "intermediate_size": 80},
        },
        {
            "vocab_size": 97,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 9,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 1]],
            "tie_word_embeddings": False,
        },
        needed={"attention_types": [[["global", "local"], 1]], "num_layers": 2},
        spelled=False,
    ),
    "gpt_neox": Entry(
        {
            "pythia": {"rotary_pct": 0.25},
            "after-one-another": {"use_parallel_residual": False, "rotary_pct": 1.0},
            "no-bias": {"attention_bias": False, "tie_word_embeddings": True},
            "base": {"rotary_emb_base": 500.0, "partial_rotary_factor": 0.5},
        },
        {**SIZES, "layer_norm_eps": 1e-3},
        spelled=False,
    ),
    "gpt_neox_japanese": Entry(
        {
            "one-bias": {},
            "quarter": {"rotary_pct": 0.25, "num_hidden_layers": 3, "tie_word_embeddings": True},
            "wide-mlp": {"intermediate_multiple_size": 2, "rotary_emb_base": 500.0},
        },
        {**SIZES, "layer_norm_eps": 1e-3},
        spelled=False,
    ),
    "gptj": Entry(
        {
            "neighbours": {},
            "wide-mlp": {"n_inner": 80, "rotary_dim": 16},
            "tied": {"n_head": 8, "rotary_dim": 4, "activation_function": "gelu"},
        },
        {**_GPT, "rotary_dim": 8},
        spelled=False,
    ),
    "granite": Entry(
        {
            "multipliers": {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.6,
                "attention_multiplier": 0.4,
                "logits_scaling": 0.25,
            },
            "silent": {},
            "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        },
        unread=_OWN_HEADS,
    ),
    "granite_swa": Entry(
        {
            "in-turn": {"sliding_window": 9, "num_hidden_layers": 5},
            "bases": {
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
                "layer_rope_theta": [500.0, 0, 10000.0],
                "num_hidden_layers": 3,
                "sliding_window": 12,
                "attention_multiplier": 0.3,
                "logits_scaling": 0.5,
            },
            "multipliers": {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.6,
                "attention_multiplier": 0.4,
                "sliding_window": 64,
                "attention_bias": True,
                "mlp_bias": True,
                "tie_word_embeddings": True,
            },
        },
        sizes={**SIZES, "sliding_window": 16},
        unread=frozenset({"null head_dim"}),
    ),
    "helium": Entry(
        {
            "neighbours": {},
            "biases": {"attention_bias": True, "mlp_bias": True},
            "tied": {"tie_word_embeddings": True, "head_dim": 8, "num_attention_heads": 8},
        },
        {**SIZES, "head_dim": 16},
        unread=_OWN_HEADS | _NO_HEADS,
    ),
    "hunyuan_v1_dense": Entry(
        {
            "plain": {},
            "alpha": {
                "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
                "attention_bias": True,
            },
            "dynamic": {"rope_scaling": DYNAMIC, "tie_word_embeddings": True},
            "beyond": {"rope_scaling": DYNAMIC, "max_position_embeddings": SHORT, "head_dim": 24},
        },
        sizes={**SIZES, "head_dim": 16},
        unread=frozenset({"null head_dim"}),
        needed={"head_dim": 128},
    ),
    "hyperclovax": Entry(
        {
            "both-sides": {"embedding_multiplier": 3.0, "residual_multiplier": 0.6},
            "one-side": {"use_post_norm": False, "attention_multiplier": 0.4},
            "scaled": {"logits_scaling": 0.25, "tie_word_embeddings": True, "head_dim": 24},
        },
        unread=_OWN_HEADS,
    ),
    "internlm3": Entry(
        {
            "gqa": {"head_dim": 16},
            "biases": {"qkv_bias": True, "bias": True, "head_dim": 24},
            "tied": {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": DYNAMIC},
        },
        {**_PADDED, "head_dim": 16},
        # Which its configuration refuses without the others.
        unread=frozenset({"biases of attention"}),
    ),
    "iquestcoder": Entry(
        {
            "gqa": {"head_dim": 16},
            "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
            "tied": {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 1},
        },
        {**SIZES, "head_dim": 16},
    ),
    "jais2": Entry(
        {
            "biased": {},
            "gqa": {"attention_bias": False, "mlp_bias": False, "num_key_value_heads": 1},
            "tied": {"tie_word_embeddings": True, "layer_norm_eps": 1e-3, "head_dim": 24},
        },
    ),
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
    "ministral": Entry(
        {
            "wide-window": {"sliding_window": 100},
            "window": {"sliding_window": 9, "head_dim": 24},
            "windows-in-turn": {
                "sliding_window": 12,
                "layer_types": ["full_attention", "sliding_attention"],
                "tie_word_embeddings": True,
            },
        },
        # transformers runs none without both.
        {**SIZES, "head_dim": 16, "sliding_window": 9},
        unread=frozenset({"null head_dim"}),
        needed={"head_dim": 128},
    ),
    "ministral3": Entry(
        {
            "wide-heads": {},
            "grown": {
                "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.4},
                "head_dim": 16,
                "tie_word_embeddings": True,
            },
            "window": {
                "rope_parameters": {
                    **YARN,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "llama_4_scaling_beta": 0.1,
                },
                "sliding_window": 9,
                "head_dim": 24,
            },
        },
        unread=frozenset({"null head_dim"}),
        scalings=frozenset(),
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
    "gemma4_text": Entry(
        {
            "as-e2b": {"num_kv_shared_layers": 3, "use_double_wide_mlp": True},
            "as-31b": {
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
                "hidden_size_per_layer_input": 0,
            },
            "both": {"attention_k_eq_v": True, "num_kv_shared_layers": 2},
            "layer-by-layer": {
                "per_layer_config": {
                    "2": {"head_dim": 24, "num_key_value_heads": 4},
                    "5": {"head_dim": 24, "num_key_value_heads": 4},
                },
                "attention_bias": True,
                "final_logit_softcapping": None,
            },
            "pattern": {"layer_types": ABSENT, "num_key_value_heads": 1},
        },
        sizes=_GEMMA_4,
        unread=_NOISY,
        spelled=False,
    ),
    "gemma4_unified_text": Entry(
        {
            "one-matrix": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
            "shared": {"num_kv_shared_layers": 3, "use_double_wide_mlp": True},
            "pattern": {"layer_types": ABSENT, "sliding_window": ABSENT, "head_dim": 24},
        },
        sizes={k: v for k, v in _GEMMA_4.items() if "per_layer" not in k},
        unread=_NOISY,
        spelled=False,
    ),
    "mpt": Entry(
        {
            "four": {},
            "six": {"n_heads": 6, "d_model": 96, "tie_word_embeddings": False},
            "scaled": {"attn_config": {"softmax_scale": 0.4}, "n_heads": 8},
            "clipped": {"attn_config": {"clip_qkv": 0.5}},
        },
        {"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        spelled=False,
    ),
    "nanochat": Entry(
        {
            "plain": {},
            "bias": {"attention_bias": True, "num_key_value_heads": 4},
            "uncapped": {"final_logit_softcapping": None, "tie_word_embeddings": True},
            "beyond": {"rope_parameters": YARN, "max_position_embeddings": SHORT},
        },
        unread=frozenset({"null head_dim"}),
    ),
    "nemotron": Entry(
        {
            "half-rotated": {},
            "biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
            "tied": {"tie_word_embeddings": True, "partial_rotary_factor": 1.0, "norm_eps": 1e-3},
        },
        unread=_LISTS | {"no key/value heads"},
        needed={"num_key_value_heads": 8},
    ),
    "olmo": Entry(
        {
            "no-gain": {},
            "bias": {"attention_bias": True, "num_key_value_heads": 4},
            "tied": {"tie_word_embeddings": True, "num_attention_heads": 8},
            "clipped": {"clip_qkv": 0.5},
        },
        unread=_OWN_HEADS,
    ),
    "olmo2": Entry(
        {
            "behind": {},
            "bias": {"attention_bias": True, "num_key_value_heads": 1},
            "tied": {"tie_word_embeddings": True, "num_hidden_layers": 3},
        },
        unread=_OWN_HEADS,
    ),
    "olmo3": Entry(
        {
            "fourth": {"num_hidden_layers": 4, "sliding_window": 9},
            "yarn": {
                "rope_scaling": YARN,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 12,
                "attention_bias": True,
            },
            "tables": {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
                },
                "num_key_value_heads": 4,
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 9,
                "tie_word_embeddings": True,
            },
        },
        sizes={**_PADDED, "sliding_window": 9},
        unread=_TABLES,
    ),
    "openai-gpt": Entry(
        {
            "tied": {"tie_word_embeddings": True},
            "untied": {"n_head": 8, "afn": "silu", "layer_norm_epsilon": 1e-3},
            "three-layers": {"n_layer": 3, "afn": "relu"},
        },
        _GPT,
        spelled=False,
    ),
    "opt": Entry(
        {
            "tied": {"tie_word_embeddings": True},
            "no-bias": {"enable_bias": False, "activation_function": "gelu"},
            "no-gain": {"layer_norm_elementwise_affine": False, "num_hidden_layers": 3},
            "as-350m": {
                "do_layer_norm_before": False,
                "word_embed_proj_dim": 32,
                "tie_word_embeddings": True,
            },
            "behind": {"do_layer_norm_before": False, "num_hidden_layers": 3},
            "narrow": {"word_embed_proj_dim": 48, "tie_word_embeddings": True},
        },
        {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 64},
        spelled=False,
    ),
    "persimmon": Entry(
        {
            "normed": {},
            "plain": {"qk_layernorm": False, "partial_rotary_factor": 0.25},
            "tied": {"tie_word_embeddings": True, "num_attention_heads": 8},
        },
        {**SIZES, "layer_norm_eps": 1e-3},
        spelled=False,
    ),
    "phi": Entry(
        {
            "as-phi-2": {"num_key_value_heads": ABSENT},
            "gqa": {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-3},
            "qk-norms": {"qk_layernorm": True, "tie_word_embeddings": True},
        },
        unread=_OWN_HEADS | _SHARE,
    ),
    "phi3": Entry(
        {
            "plain": {"sliding_window": 9},
            "longrope, inside": {
                "rope_scaling": LONGROPE,
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 64,
                "num_key_value_heads": 4,
            },
            "longrope, beyond": {
                "rope_scaling": SIX,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": SHORT,
                "tie_word_embeddings": True,
            },
        },
        sizes=_PADDED,
        unread=frozenset({"null head_dim"}),
        scalings=frozenset({"default", "longrope"}),
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
            "wide-heads": {"head_dim": ABSENT},
            "tied": {"tie_word_embeddings": True},
            "bias": {"attention_bias": True, "head_dim": 24},
            "window": {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "rope-linear": {"rope_parameters": LINEAR, "max_position_embeddings": SHORT},
        },
        {**SIZES, "head_dim": 16},
        unread=_NO_HEADS | _SWITCHED,
    ),
    "seed_oss": Entry(
        {
            "biased": {},
            "biases": {"attention_out_bias": True, "mlp_bias": True},
            "plain": {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 24},
        },
        {**SIZES, "head_dim": 16},
        unread=_NO_HEADS,
    ),
    "smollm3": Entry(
        {
            "fourth": {"num_hidden_layers": 4, "tie_word_embeddings": True},
            "given": {"no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True},
            "windows": {
                "no_rope_layer_interval": 2,
                "use_sliding_window": True,
                "sliding_window": 9,
            },
            "rope-yarn": {"rope_parameters": YARN, "max_position_embeddings": SHORT},
        },
        sizes=_PADDED,
        unread=frozenset({"null head_dim"}),
    ),
    "stablelm": Entry(
        {
            "quarter-rotated": {},
            "parallel": {"use_parallel_residual": True, "use_qkv_bias": True},
            "norms-of-each-head": {"qk_layernorm": True, "tie_word_embeddings": True},
            "both": {"qk_layernorm": True, "use_parallel_residual": True},
        },
        {**SIZES, "partial_rotary_factor": 0.5},
        unread=_OWN_HEADS | _NO_HEADS | _SHARE,
    ),
    "starcoder2": Entry(
        {
            "biased": {},
            "no-bias": {"use_bias": False, "num_key_value_heads": 1},
            "window": {"sliding_window": 9, "tie_word_embeddings": True, "norm_epsilon": 1e-3},
        },
        unread=_OWN_HEADS | _NO_HEADS,
    ),
    "vaultgemma": Entry(
        {
            "in-turn": {"sliding_window": 9, "attn_logit_softcapping": 2.0},
            "three": {"num_hidden_layers": 3, "query_pre_attn_scalar": 24, "head_dim": 24},
            "no-caps": {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 12,
                "tie_word_embeddings": True,
            },
        },
        sizes=_GEMMA,
        unread=frozenset({"null head_dim"}),
    ),
    "xglm": Entry(
        {
            "waves": {},
            "unscaled": {"scale_embedding": False, "num_layers": 3},
            "untied": {"tie_word_embeddings": False, "activation_function": "relu"},
        },
        {
            **{"vocab_size": 97, "d_model": 64, "ffn_dim": 80, "num_layers": 2},
            **{"attention_heads": 4, "max_position_embeddings": 128},
        },
        spelled=False,
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
    return randomize(model.float())


def checkpoint(folder: Path, model_type: str, changes: Mapping[str, Any]) -> Any:
    """Write a checkpoint and return the model of transformers, the file as it was given."""
    write_config(folder, model_type, changes)
    given = (folder / "config.json").read_bytes()
    theirs = their_model(folder)
    save(theirs, folder)
    (folder / "config.json").write_bytes(given)
    return theirs
