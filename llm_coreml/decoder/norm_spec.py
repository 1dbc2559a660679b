"""What a norm is, as data, and what a size may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_coreml.errors import CheckpointError


@dataclass(frozen=True)
class NormSpec:
    """A norm.

    Attributes:
        eps: Added to the mean square, or to the variance.
        kind: `rms` (root mean square) or `layer` (the mean is taken off first).
        gain: A gain follows.
        bias: And a bias.
    """

    eps: float = 1e-5
    kind: Literal["rms", "layer"] = "rms"
    gain: bool = True
    bias: bool = False


def check_size(name: str, value: object) -> None:
    """Refuse a size of a `config.json` that is no positive whole number. Raises CheckpointError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"config.json gives {name} = {value!r}; it must be a positive whole number."
        )
