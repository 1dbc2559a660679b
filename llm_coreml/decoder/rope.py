"""Rotary position embedding: tables made once in fp64, applied by halves.

Angles computed in fp16 inside the program are useless past a few hundred positions,
so the program holds cosines and sines for every position instead.

    cos, sin = rope_tables(spec.rotary[0], context=2048)   # each [2048, dim / 2]

A table is fixed, so two scalings that go by the length of a text go by the context here:
`table_notes` tells of it.

Sources: RoFormer (arXiv 2104.09864) for the rotation; the Llama 3.1 model card for `llama3`; YaRN
(arXiv 2309.00071) for `yarn`, and for `dynamic`, which it calls Dynamic NTK; LongRoPE (arXiv
2402.13753) for `longrope`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from llm_coreml.decoder.rope_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, context: int = 0) -> torch.Tensor:
    """Return the angle per position of each rotated pair: float64 `[dim / 2]`.

    Args:
        rope: The table.
        context: Positions that it is for, which `dynamic` and `longrope` go by.
    """
    if rope.kind == "dynamic":
        return _series(rope.dim, _larger_base(rope, context))
    frequencies = _series(rope.dim, rope.theta)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3_scaled(frequencies, rope)
    if rope.kind == "yarn":
        return _yarn_scaled(frequencies, rope)
    if rope.kind == "longrope":
        factors = rope.long_factors if rope.stretched(context) else rope.short_factors
        return frequencies / torch.tensor(factors, dtype=torch.float64)
    if rope.kind == "proportional":
        turned = torch.arange(len(frequencies)) < (rope.dim if rope.pairs is None else rope.pairs)
        return frequencies * turned / rope.factor
    return frequencies


def _series(dim: int, theta: float) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return theta**-exponents


def _larger_base(rope: RopeSpec, context: int) -> float:
    """Return a base with which the slowest pair turns as far as it did in the trained context."""
    trained = rope.original_max_position_embeddings
    if not rope.stretched(context) or rope.dim == 2:  # one pair, of frequency 1 for any base
        return rope.theta
    share = rope.factor * context / trained - (rope.factor - 1)
    return float(rope.theta * share ** (rope.dim / (rope.dim - 2)))


def _llama3_scaled(frequencies: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Divide long wavelengths by `factor`, keep short ones, blend linearly between."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn_scaled(frequencies: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Divide slow pairs by `factor`, keep fast ones, blend linearly by their number between."""

    def pair_of(turns: float) -> float:
        """Return the pair that turns so often within the trained context."""
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bounds are those of the numbers of a head, not of its pairs, as published models have it.
    first, last = max(first, 0), min(last, rope.dim - 1)
    width = last - first if last != first else 0.001
    pairs = torch.arange(len(frequencies), dtype=torch.float64)
    divided = ((pairs - first) / width).clamp(0.0, 1.0)
    return frequencies * (1 - divided + divided / rope.factor)


def rope_tables(rope: RopeSpec, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of every position, each float64 `[context, dim / 2]`.

    They are multiplied by `attention_factor`.
    """
    positions = torch.arange(context, dtype=torch.float64)
    angles = torch.outer(positions, inverse_frequencies(rope, context))
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def table_notes(tables: Iterable[RopeSpec], context: int) -> list[str]:
    """Return a sentence for every kind of table that goes by the context instead of by the text."""
    notes = []
    for rope in dict.fromkeys(tables):
        trained = rope.original_max_position_embeddings
        if rope.kind == "longrope" and rope.long_factors != rope.short_factors:
            taken, other = ("long", "short") if rope.stretched(context) else ("short", "long")
            when = "up to" if rope.stretched(context) else "beyond"
            notes.append(
                f"RoPE takes the {taken} factors of longrope for the whole context of {context}; "
                f"transformers takes the {other} ones for texts {when} {trained} tokens."
            )
        if rope.kind == "dynamic" and rope.stretched(context):
            notes.append(
                f"RoPE turns by the angles that dynamic scaling has for the whole context of "
                f"{context}; transformers has others for shorter texts, and unscaled ones up to "
                f"{trained} tokens."
            )
    return notes


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


def both_halves(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `rotate_at_once` takes of cosines and sines `[S, dim / 2]`: `[S, dim]` each."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_at_once(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Do what `rotate` does, to the bit, in fewer operations, for heads that come first.

    Args:
        x: Queries and keys, `[1, heads, S, head_dim]`.
        cos: See `both_halves`.
        sin: See `both_halves`.
    """
    dim, head_dim = cos.shape[-1], x.shape[-1]
    x, *rest = x.split_with_sizes([dim, head_dim - dim], dim=-1) if dim < head_dim else (x,)
    first, second = x.split_with_sizes([dim // 2, dim // 2], dim=-1)
    turned = x * cos + torch.cat((second, first), dim=-1) * sin
    return torch.cat((turned, *rest), dim=-1) if rest else turned
