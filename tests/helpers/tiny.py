"""Tiny random models: made in a moment, large enough in their logits to tell right from wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_coreml.decoder import DecoderSpec
from llm_coreml.families import find_family

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


def small_spec(**changes: Any) -> DecoderSpec:
    """Return the spec of a small llama of two layers, its config changed by `changes`."""
    config = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return find_family(config).spec({**config, **changes})


def randomize(model: Any, seed: int = 0, std: float = 0.15) -> Any:
    """Give every parameter random values, norms around one, and return the model for inference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            norm = "norm" in name or ".ln_" in name
            parameter.copy_(1 + noise if norm else noise)
    return model.eval()


def llama(**changes: Any) -> Any:
    """Return a random `LlamaForCausalLM` in fp32, `BASE` changed by `changes`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return randomize(LlamaForCausalLM(LlamaConfig(**{**BASE, **changes})))


def mistral(**changes: Any) -> Any:
    """Return a random `MistralForCausalLM` in fp32, `BASE` changed by `changes`."""
    from transformers import MistralConfig, MistralForCausalLM

    return randomize(MistralForCausalLM(MistralConfig(**{**BASE, **changes})))


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write `model` as a checkpoint folder and return the folder."""
    model.save_pretrained(folder, **options)
    return folder


def tokens_for(vocab_size: int, count: int, seed: int = 0) -> list[int]:
    """Return `count` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(vocab_size, (count,), generator=generator).tolist()
    return drawn


def expected_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Return what `transformers` computes without a cache: float32 `[len(tokens), vocab]`."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def random_split(count: int, lengths: Sequence[int], seed: int) -> list[int]:
    """Write `count` as a sum of `lengths` in random order; `lengths` holds 1."""
    draw = random.Random(seed)
    parts: list[int] = []
    while left := count - sum(parts):
        parts.append(draw.choice([length for length in lengths if length <= left]))
    return parts
