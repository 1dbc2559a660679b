"""Rotary position embedding: tables made once in fp64, applied by halves.

Angles computed in fp16 inside the program are useless past a few hundred positions,
so the program holds cosines and sines for every position instead.

    cos, sin = rope_tables(spec.rope, spec.head_dim, context=2048)   # each [2048, head_dim / 2]

Sources: RoFormer (arXiv 2104.09864) for the rotation; the Llama 3.1 model card for `llama3`.
"""

from __future__ import annotations

import math

import torch

from llm_coreml.decoder.spec import RopeSpec
from llm_coreml.errors import UnsupportedError


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Return the angle per position of each rotated pair: float64 `[head_dim / 2]`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = rope.theta**-exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3_scaled(frequencies, rope)
    return frequencies


def _llama3_scaled(frequencies: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Divide long wavelengths by `factor`, keep short ones, blend linearly between."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / rope.factor)


def rope_tables(rope: RopeSpec, head_dim: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of every position, each float64 `[context, head_dim / 2]`.

    Raises:
        UnsupportedError: `dynamic` scaling past the trained length, where the angles depend on
            the length of each call and no fixed table can hold them.
    """
    trained = rope.original_max_position_embeddings
    if rope.kind == "dynamic" and context > trained:
        raise UnsupportedError(
            f"rope_scaling 'dynamic' changes its angles past {trained} positions, which a fixed "
            f"table of {context} cannot hold; use --context {trained} or less."
        )
    positions = torch.arange(context, dtype=torch.float64)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + head_dim / 2) of `x` `[1, S, heads, head_dim]`.

    Args:
        x: Queries or keys.
        cos: Cosines of the S positions, `[S, 1, head_dim / 2]`.
        sin: Sines, same shape.
    """
    half = x.shape[-1] // 2
    first, second = x.split_with_sizes([half, half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
