"""What a table of rotary position embedding is, as data.

RopeSpec(dim=64, theta=500000.0)                                  # heads of 64, all of it turned
RopeSpec(96, kind="yarn", factor=4.0, original_max_position_embeddings=32768)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_coreml.errors import CheckpointError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


@dataclass(frozen=True)
class RopeSpec:
    """A table of rotary position embedding: its base, and how positions past training are scaled.

    Attributes:
        dim: How many numbers of a head are rotated, its first ones; the others stay as they are.
        theta: Base of the geometric series of frequencies.
        kind: `default`; `linear`, all frequencies divided by `factor`; `dynamic`, unscaled inside
            `original_max_position_embeddings`, and of a larger base beyond; `llama3` and `yarn`,
            low frequencies divided; `longrope`, each divided by a number of its own;
            `proportional`, where the first `pairs` turn alone.
        factor: Scale of all kinds but `default` and `longrope`.
        low_freq_factor: `llama3`: wavelengths above context / this are divided by `factor`.
        high_freq_factor: `llama3`: wavelengths below context / this stay as they are.
        original_max_position_embeddings: The context that the model was first trained on.
        attention_factor: What cosines and sines are multiplied by.
        beta_fast: `yarn`: what turns more often within the trained context stays as it is.
        beta_slow: `yarn`: what turns less often within it is divided by `factor`.
        truncate: `yarn`: the pairs between the two are counted outwards to whole ones.
        short_factors: `longrope`: for each pair, inside `original_max_position_embeddings`.
        long_factors: `longrope`: for each pair, beyond.
        pairs: `proportional`: how many pairs turn, None for all.

    Raises:
        CheckpointError: `dim` is odd, or there are not as many factors as pairs.
    """

    dim: int
    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    pairs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 1:
            raise CheckpointError(
                f"config.json gives head_dim = {self.dim!r}; it must be a positive whole number."
            )
        if self.dim % 2:
            raise CheckpointError(
                f"config.json gives head_dim = {self.dim}; rotary embeddings need an even one."
            )
        if self.kind == "yarn" and not self.theta > 1:
            raise CheckpointError(
                f"config.json gives rope_theta = {self.theta}; yarn scaling needs one above 1."
            )
        if self.kind == "longrope":
            _check_count("short_factor", self.short_factors, self.dim // 2)
            _check_count("long_factor", self.long_factors, self.dim // 2)

    def reach(self, positions: int) -> int:
        """Return how long a context the scaling is made for, in a model meant for `positions`."""
        if self.kind in ("linear", "dynamic"):
            return int(positions * max(1.0, self.factor))
        if self.kind == "yarn":
            return max(positions, int(self.original_max_position_embeddings * self.factor))
        return positions

    def stretched(self, context: int) -> bool:
        """Say whether a context of this length takes other angles than a shorter one would."""
        beyond = context > self.original_max_position_embeddings
        return self.kind in ("dynamic", "longrope") and beyond


def _check_count(name: str, factors: tuple[float, ...], pairs: int) -> None:
    if len(factors) != pairs:
        raise CheckpointError(
            f"config.json gives {len(factors)} numbers in {name} of RoPE, and {pairs} pairs of "
            "each head are rotated. Download or save the model again."
        )
