"""What verifying an artifact found, as a manifest records it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

# fp16 keeps 11 bits and a decoder adds up a few hundred roundings: one part in a hundred is
# usual for the worst logit of a row, ten is a defect. fp32 programs are held to the same bound.
MAX_RELATIVE_ERROR = 2e-2
MAX_MEAN_KL = 1e-3
# Where a model's own numbers make plain fp16 worse than that, an artifact may be as much further
# off: it rounds at places of its own, and the largest of few errors is a matter of chance. The
# divergence grows with the square of the error.
NOISE_FACTOR = 2.0
# Beyond that it is another model, whatever the reason.
DIVERGED_KL = 0.1


@dataclass(frozen=True)
class PlainFp16:
    """How far plain fp16 takes the quantized model from itself, in eager PyTorch.

    Attributes:
        rows: Rows of logits compared.
        max_relative_error: Largest logit difference over the largest logit.
        mean_kl: Mean Kullback-Leibler divergence, in nats.
        layer: The layer, from 0, in which the error of the residual stream grows most.
    """

    rows: int
    max_relative_error: float
    mean_kl: float
    layer: int

    @property
    def noisy(self) -> bool:
        """Whether it is worse than what is usual."""
        usual = self.max_relative_error <= MAX_RELATIVE_ERROR and self.mean_kl <= MAX_MEAN_KL
        return not usual


@dataclass(frozen=True)
class Conversion:
    """How far an artifact that rounds nothing is from the eager quantized model.

    Attributes:
        weights: Tensors of the model, all of which the program holds bit by bit.
        rows: Rows of logits compared.
        max_relative_error: Largest logit difference over the largest logit.
        max_relative_error_bound: Bound on it, see `conversion_bound`.
    """

    weights: int
    rows: int
    max_relative_error: float
    max_relative_error_bound: float

    @property
    def passed(self) -> bool:
        """Whether it is within its bound, which NaN never is."""
        return self.max_relative_error <= self.max_relative_error_bound


@dataclass(frozen=True)
class Verification:
    """How far an artifact's logits are from the eager quantized model's.

    Attributes:
        runtime: What executed the artifact.
        text: What was read.
        tokens: Tokens read, over all passes.
        last_position: Highest position read.
        rows: Rows of logits compared.
        max_relative_error: Largest logit difference over the largest logit.
        mean_kl: Mean Kullback-Leibler divergence of the next-token distributions, in nats.
        conversion: What was found without rounding; None where the runtime cannot do that,
            or the release did not.
        max_relative_error_bound: Bound on the error.
        mean_kl_bound: Bound on the divergence.
        plain_fp16: What plain fp16 makes of the model; None where the program computes in fp32,
            or the release did not ask.
    """

    runtime: str
    text: str
    tokens: int
    last_position: int
    rows: int
    max_relative_error: float
    mean_kl: float
    conversion: Conversion | None = None
    max_relative_error_bound: float = MAX_RELATIVE_ERROR
    mean_kl_bound: float = MAX_MEAN_KL
    plain_fp16: PlainFp16 | None = None

    @property
    def passed(self) -> bool:
        """Whether both figures are within their bounds, which NaN never is."""
        error = self.max_relative_error <= self.max_relative_error_bound
        return error and self.mean_kl <= self.mean_kl_bound

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def bounds(plain: PlainFp16 | None) -> tuple[float, float]:
    """Return what the error and the divergence of an artifact may be, by what plain fp16 makes."""
    if plain is None:
        return MAX_RELATIVE_ERROR, MAX_MEAN_KL
    error, divergence = plain.max_relative_error, plain.mean_kl
    # Numbers that plain fp16 cannot hold excuse nothing.
    if not (math.isfinite(error) and math.isfinite(divergence)):
        return MAX_RELATIVE_ERROR, MAX_MEAN_KL
    return (
        max(MAX_RELATIVE_ERROR, NOISE_FACTOR * error),
        min(max(MAX_MEAN_KL, NOISE_FACTOR**2 * divergence), DIVERGED_KL),
    )
