"""What verifying an artifact found, as a manifest records it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# fp16 keeps 11 bits and a decoder adds up a few hundred roundings: one part in a hundred is
# usual for the worst logit of a row, ten is a defect. fp32 programs are held to the same bound.
MAX_RELATIVE_ERROR = 2e-2
MAX_MEAN_KL = 1e-3


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

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)
