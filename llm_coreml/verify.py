"""Does the program that was written compute what the model computes?

The artifact and the eager quantized decoder read the same real text, in every length that the
program accepts, in both orders, then token by token, at the beginning and at the end of the
context. What they disagree by is bounded, and the bound is part of the manifest.

    verification = verify(artifact, eager, tokens, "held-out text")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        text: What was read.
        tokens: Tokens read, over all passes.
        last_position: Highest position read.
        rows: Rows of logits compared.
        max_relative_error: Largest logit difference over the largest logit.
        mean_kl: Mean Kullback-Leibler divergence of the next-token distributions, in nats.
        max_relative_error_bound: Bound on the former.
        mean_kl_bound: Bound on the latter.
    """

    runtime: str
    text: str
    tokens: int
    last_position: int
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


def verify(
    artifact: Runner,
    eager: Runner,
    tokens: Sequence[int],
    text: str,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Verification:
    """Compare the two on `tokens`.

    Args:
        artifact: The written program.
        eager: The quantized decoder.
        tokens: What to read; more than the context is not.
        text: What it is, for the record.
        on_progress: Called with the share done, 0 to 1.

    Raises:
        VerificationError: they differ by more than the bounds allow.
    """
    passes = verification_passes(artifact.seq_lengths, artifact.context, len(tokens))
    compared = _compare(artifact, eager, tokens, passes, on_progress)
    # max() of a tensor keeps NaN, as the bounds need.
    worst, largest = float(compared.errors.max()), float(compared.sizes.max())
    result = Verification(
        runtime=artifact.label,
        text=text,
        tokens=sum(part.count for part in passes),
        last_position=max(part.start + part.count for part in passes) - 1,
        rows=len(compared.divergences),
        max_relative_error=worst / largest if largest else worst,
        mean_kl=float(compared.divergences.mean()),
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


@dataclass(frozen=True)
class Pass:
    """One reading of the text.

    Attributes:
        start: Position of the first token; the cache before it is zero.
        lengths: Chunks to feed.
    """

    start: int
    lengths: tuple[int, ...]

    @property
    def count(self) -> int:
        """Tokens read."""
        return sum(self.lengths)


@dataclass(frozen=True)
class _Compared:
    """Figures of every chunk, and the divergence of every row."""

    errors: torch.Tensor
    sizes: torch.Tensor
    divergences: torch.Tensor


def _compare(
    artifact: Runner,
    eager: Runner,
    tokens: Sequence[int],
    passes: Sequence[Pass],
    on_progress: Callable[[float], None],
) -> _Compared:
    total, read = sum(part.count for part in passes), 0
    errors, sizes, divergences = [], [], []
    expected: dict[int, torch.Tensor] = {}
    for part in passes:
        if part.start not in expected:
            # A causal model: what it says of a text begins with what it says of its beginning.
            longest = max(other.count for other in passes if other.start == part.start)
            expected[part.start] = eager.logits(tokens[:longest], part.start)
        artifact.reset(part.start)
        at = 0
        for length in part.lengths:
            rows = artifact.step(tokens[at : at + length])
            at += length
            wanted = expected[part.start][at - rows.shape[0] : at]
            errors.append((rows - wanted).abs().max())
            sizes.append(wanted.abs().max())
            divergences.append(kl_divergence(wanted, rows))
            on_progress((read + at) / total)
        read += at
    return _Compared(torch.stack(errors), torch.stack(sizes), torch.cat(divergences))


def verification_passes(lengths: Sequence[int], context: int, available: int) -> list[Pass]:
    """Plan what to read: every length from either end, decode after it, and the context's end."""
    limit = min(context, available)
    descending = _chunks(sorted(lengths, reverse=True), limit)
    ascending = _chunks(sorted(lengths), limit)
    return [
        Pass(0, descending),
        Pass(0, ascending),
        Pass(context - sum(ascending), ascending),
    ]


def _chunks(lengths: Sequence[int], limit: int) -> tuple[int, ...]:
    parts: list[int] = []
    for length in lengths:
        if sum(parts) + length <= limit:
            parts.append(length)
    return (*parts, *([1] * min(_DECODED, limit - sum(parts))))
