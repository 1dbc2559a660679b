"""Rotary position embedding: tables made once in fp64, applied by halves.

Angles computed in fp16 inside the program are useless past a few hundred positions,
so the program holds cosines and sines for every position instead.

    cos, sin = rope_tables(spec.rotary[0], context=2048)   # each [2048, dim / 2]

Sources: RoFormer (arXiv 2104.09864) for the rotation; the Llama 3.1 model card for `llama3`.
"""

from __future__ import annotations

import math

import torch

from llm_coreml.decoder.spec import RopeSpec
from llm_coreml.errors import UnsupportedError


def inverse_frequencies(rope: RopeSpec) -> torch.Tensor:
    """Return the angle per position of each rotated pair: float64 `[dim / 2]`."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim
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


def rope_tables(rope: RopeSpec, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of every position, each float64 `[context, dim / 2]`.

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
    angles = torch.outer(positions, inverse_frequencies(rope))
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + dim / 2) of the first `dim` numbers of `x` `[1, S, heads, head_dim]`.

    Args:
        x: Queries or keys.
        cos: Cosines of the S positions, `[S, 1, dim / 2]`.
        sin: Sines, same shape.
    """
    half = cos.shape[-1]
    left = x.shape[-1] - 2 * half
    first, second, *rest = x.split_with_sizes([half, half, left] if left else [half, half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, *rest), dim=-1)
