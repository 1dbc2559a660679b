"""Does the program that was written compute what the model computes?

The artifact and the eager quantized decoder read the same real text, in every length that the
program accepts, in both orders, then token by token. What they disagree by is bounded, and the
bound is part of the manifest.

    verification = verify(artifact, eager, tokens)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llm_coreml.errors import VerificationError
from llm_coreml.fidelity import kl_divergence
from llm_coreml.runtime import Runner

# fp16 keeps 11 bits and a decoder adds up a few hundred roundings: one part in a hundred is
# usual for the worst logit of a row, ten is a defect. fp32 programs are held to the same bound.
MAX_RELATIVE_ERROR = 2e-2
MAX_MEAN_KL = 1e-3
_DECODED = 16


@dataclass(frozen=True)
class Verification:
    """How far an artifact's logits are from the eager quantized model's.

    Attributes:
        runtime: What executed the artifact.
        tokens: Tokens read, over all passes.
        rows: Rows of logits compared.
        max_relative_error: Largest logit difference over the largest logit.
        mean_kl: Mean Kullback-Leibler divergence of the next-token distributions, in nats.
        max_relative_error_bound: Bound on the former.
        mean_kl_bound: Bound on the latter.
    """

    runtime: str
    tokens: int
    rows: int
    max_relative_error: float
    mean_kl: float
    max_relative_error_bound: float = MAX_RELATIVE_ERROR
    mean_kl_bound: float = MAX_MEAN_KL

    @property
    def passed(self) -> bool:
        """Both figures are numbers within their bounds."""
        return (
            self.max_relative_error <= self.max_relative_error_bound
            and self.mean_kl <= self.mean_kl_bound
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def verify(artifact: Runner, eager: Runner, tokens: Sequence[int]) -> Verification:
    """Compare the two on `tokens`.

    Raises:
        VerificationError: they differ by more than the bounds allow.
    """
    read, worst, largest = 0, 0.0, 0.0
    divergences: list[torch.Tensor] = []
    passes = verification_passes(artifact.seq_lengths, min(len(tokens), artifact.context))
    # A causal model: what it says of a text begins with what it says of the text's beginning.
    expected = eager.logits(tokens[: max(map(sum, passes))])
    for parts in passes:
        text = tokens[: sum(parts)]
        artifact.reset()
        start = 0
        for length in parts:
            rows = artifact.step(text[start : start + length])
            start += length
            wanted = expected[start - rows.shape[0] : start]
            # A plain max() would pass over NaN.
            error = float((rows - wanted).abs().max())
            worst = error if not error <= worst else worst
            largest = max(largest, float(wanted.abs().max()))
            divergences.append(kl_divergence(wanted, rows))
        read += len(text)
    divergence = torch.cat(divergences)
    result = Verification(
        runtime=artifact.label,
        tokens=read,
        rows=len(divergence),
        max_relative_error=worst / largest if largest else worst,
        mean_kl=float(divergence.mean()),
    )
    if not result.passed:
        raise VerificationError(
            f"The artifact does not compute what the model computes: the largest logit error is "
            f"{result.max_relative_error:.2e} of the largest logit (bound "
            f"{result.max_relative_error_bound:.0e}) and the mean KL divergence is "
            f"{result.mean_kl:.2e} nats (bound {result.mean_kl_bound:.0e}). Nothing was written; "
            "try --compute-precision fp32, and report the model if that fails too."
        )
    return result


def verification_passes(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Split up to `count` tokens into chunks: descending and ascending lengths, then decode."""
    passes = []
    for order in (sorted(lengths, reverse=True), sorted(lengths)):
        parts: list[int] = []
        for length in order:
            if sum(parts) + length <= count:
                parts.append(length)
        parts += [1] * min(_DECODED, count - sum(parts))
        passes.append(parts)
    return passes
