"""Does the program that was written compute what the model computes?

Two questions, one after the other. Is it the same model: run without rounding, the artifact must
hold the eager model's weights bit by bit and give its logits but for the order of fp32 sums. And is
it precise enough: run as it declares, its logits may differ by what fp16 activations cost. Both
times it reads real text, in every length that it accepts, from both ends, then token by token, at
the beginning and at the end of the context. The bounds are part of the manifest.

    reading = ReadText(eager.at, tokens, "held-out text", lengths, context, every_row=False)
    conversion = verify_conversion(unrounded, decoder, reading)
    verification = verify(artifact, reading, conversion)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from llm_coreml.decoder import Decoder
from llm_coreml.errors import VerificationError
from llm_coreml.fidelity import kl_divergence
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner
from llm_coreml.verify.verification import MAX_RELATIVE_ERROR, Conversion, Verification
from llm_coreml.verify.weights import check_weights

# The second reads what the first has written. Each is a call: a longer decoding costs time on a
# large model, and shows nothing more.
_DECODED = 2


def conversion_bound(decoder: Decoder) -> float:
    """Return the largest relative error that the order of fp32 sums explains.

    What fp16 activations may cost is scaled to the 13 more bits of fp32. There a product's sum is
    rounded as often as it has terms, not once, which in random directions counts as their root.
    """
    terms = max(decoder.spec.widest_sum, decoder.context)
    return MAX_RELATIVE_ERROR * 2.0**-13 * math.sqrt(terms)


# Tokens, the position of the first, and which of them -> the logits after those.
Judge = Callable[[Sequence[int], int, Sequence[int]], torch.Tensor]


class ReadText:
    """A text as the eager model reads it; its logits are computed once for all comparisons.

    Args:
        judge: `EagerRunner.at` of the quantized decoder.
        tokens: What to read; more than the context is not.
        text: What it is, for the record.
        lengths: Chunks that the artifact accepts.
        context: Positions of its cache.
        every_row: Whether it returns every row of a chunk, or the last.

    Attributes:
        passes: How the artifact is to read the text.
    """

    def __init__(
        self,
        judge: Judge,
        tokens: Sequence[int],
        text: str,
        lengths: Sequence[int],
        context: int,
        every_row: bool,
    ) -> None:
        self.tokens = tokens
        self.text = text
        self.passes = verification_passes(lengths, context, len(tokens))
        compared: dict[int, set[int]] = {}
        for part in self.passes:
            ends = range(1, part.count + 1) if every_row else accumulate(part.lengths)
            compared.setdefault(part.start, set()).update(end - 1 for end in ends)
        # A causal model: what it says of a text begins with what it says of its beginning.
        self._rows = {
            start: dict(
                zip(sorted(rows), judge(tokens[: max(rows) + 1], start, sorted(rows)), strict=True)
            )
            for start, rows in compared.items()
        }

    def rows(self, start: int, first: int, last: int) -> torch.Tensor:
        """Return the logits after tokens `first` to `last` - 1, read from position `start`."""
        return torch.stack([self._rows[start][row] for row in range(first, last)])


def verify_conversion(
    unrounded: ReferenceRunner,
    decoder: Decoder,
    reading: ReadText,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Conversion:
    """Check that the artifact is the model: the same weights, and the same function of them.

    Args:
        unrounded: The written program, opened in the mode `fp32`.
        decoder: The quantized decoder.
        reading: The text, read by that decoder.
        on_progress: Called with the share done, 0 to 1.

    Raises:
        VerificationError: a weight differs, or the logits do by more than sums explain.
    """
    weights = check_weights(unrounded.constants(), decoder)
    compared = _compare(unrounded, reading, reading.passes, on_progress)
    result = Conversion(
        weights, len(compared.divergences), compared.relative_error, conversion_bound(decoder)
    )
    if not result.max_relative_error <= result.max_relative_error_bound:
        raise VerificationError(
            "The artifact is not the model: it holds the weights, but run without rounding its "
            f"largest logit error is {result.max_relative_error:.2e} of the largest logit (bound "
            f"{result.max_relative_error_bound:.1e}), {compared.worst}. Nothing was written; "
            "report the model."
        )
    return result


def verify(
    artifact: Runner,
    reading: ReadText,
    conversion: Conversion | None = None,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Verification:
    """Check that the artifact is precise enough as it is.

    Args:
        artifact: The written program.
        reading: The text, read by the quantized decoder.
        conversion: What was found without rounding, for the record.
        on_progress: Called with the share done, 0 to 1.

    Raises:
        VerificationError: they differ by more than the bounds allow.
    """
    # That the order of the lengths makes no difference has been seen there.
    passes = reading.passes if conversion is None else [*reading.passes[:-2], reading.passes[-1]]
    compared = _compare(artifact, reading, passes, on_progress)
    result = Verification(
        runtime=artifact.label,
        text=reading.text,
        tokens=sum(part.count for part in passes),
        last_position=max(part.start + part.count for part in passes) - 1,
        rows=len(compared.divergences),
        max_relative_error=compared.relative_error,
        mean_kl=float(compared.divergences.mean()),
        conversion=conversion,
    )
    within = result.max_relative_error <= result.max_relative_error_bound
    if not (within and result.mean_kl <= result.mean_kl_bound):
        raise VerificationError(
            f"The artifact does not compute what the model computes: the largest logit error is "
            f"{result.max_relative_error:.2e} of the largest logit (bound "
            f"{result.max_relative_error_bound:.0e}), {compared.worst}, and the mean KL divergence "
            f"is {result.mean_kl:.2e} nats (bound {result.mean_kl_bound:.0e}). Nothing was "
            "written; try --compute-precision fp32, and report the model if that fails too."
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
    """What a comparison found.

    Attributes:
        relative_error: Largest logit difference over the largest logit; NaN if there is one.
        worst: Where the largest difference is, in words.
        divergences: Kullback-Leibler divergence of every row, in nats.
    """

    relative_error: float
    worst: str
    divergences: torch.Tensor


def _compare(
    artifact: Runner,
    reading: ReadText,
    passes: Sequence[Pass],
    on_progress: Callable[[float], None],
) -> _Compared:
    total, read = sum(part.count for part in passes), 0
    errors, sizes, divergences, places = [], [], [], []
    for part in passes:
        artifact.reset(part.start)
        at = 0
        for length in part.lengths:
            rows = artifact.step(reading.tokens[at : at + length])
            at += length
            wanted = reading.rows(part.start, at - len(rows), at)
            error = (rows - wanted).abs()
            errors.append(error.max())
            sizes.append(wanted.abs().max())
            row, token = divmod(int(error.argmax()), error.shape[1])
            places.append((part.start + at - len(rows) + row, length, token))
            divergences.append(kl_divergence(wanted, rows))
            on_progress((read + at) / total)
        read += at
    # max() of a tensor keeps NaN, as the bounds need; so does argmax.
    position, length, token = places[int(torch.stack(errors).argmax())]
    worst, largest = float(torch.stack(errors).max()), float(torch.stack(sizes).max())
    return _Compared(
        worst / largest if largest else worst,
        f"for token {token} after position {position}, in a call of length {length}",
        torch.cat(divergences),
    )


def verification_passes(lengths: Sequence[int], context: int, available: int) -> list[Pass]:
    """Plan what to read: every length from either end, decode after it, and the context's end."""
    limit = min(context, available)
    left = sorted((length for length in lengths if length <= limit), reverse=True)
    passes = []
    while left:
        # Not all of them need fit the context together.
        descending = _fitting(left, limit)
        passes.append(Pass(0, _with_decoding(descending, limit)))
        left = [length for length in left if length not in descending]
    ascending = _with_decoding(_fitting(sorted(lengths), limit), limit)
    return [*passes, Pass(0, ascending), Pass(context - sum(ascending), ascending)]


def _fitting(lengths: Sequence[int], limit: int) -> tuple[int, ...]:
    parts: list[int] = []
    for length in lengths:
        if sum(parts) + length <= limit:
            parts.append(length)
    return tuple(parts)


def _with_decoding(lengths: tuple[int, ...], limit: int) -> tuple[int, ...]:
    return (*lengths, *([1] * min(_DECODED, limit - sum(lengths))))
