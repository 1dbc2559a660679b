"""Does the program that was written compute what the model computes?

Two questions, one after the other. Is it the same model: run without rounding, the artifact must
hold the eager model's weights bit by bit and give its logits but for the order of fp32 sums. And is
it precise enough: run as it declares, its logits may differ by what fp16 activations cost, usually
or in this very model. Both times it reads real text, in every length that is asked for, from the
first position to the last, where its cache holds what the text has left there. The bounds are part
of the manifest.

    reading = read_text(decoder, tokens, "held-out text", plan, ...)
    conversion = verify_conversion(unrounded, decoder, reading)
    verification = verify(artifact, reading, conversion)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.eight_bit import EightBit
from llm_coreml.errors import VerificationError
from llm_coreml.fidelity import kl_divergence
from llm_coreml.reference.program.constants import PackedWeight
from llm_coreml.reference.program.side_by_side import OnRows
from llm_coreml.runtime.reference import Chunk, ReferenceRunner, Sequenced
from llm_coreml.runtime.runner import Runner
from llm_coreml.verify.passes import Pass
from llm_coreml.verify.reading import ReadText
from llm_coreml.verify.verification import (
    MAX_RELATIVE_ERROR,
    Conversion,
    PlainFp16,
    Verification,
    bounds,
)
from llm_coreml.verify.weights import Digest, check_weights


def conversion_bound(decoder: Decoder, plain: PlainFp16 | None = None) -> float:
    """Return the largest relative error that the order of fp32 sums explains.

    What fp16 activations may cost is scaled to the 13 more bits of fp32. There a product's sum is
    rounded as often as it has terms, not once, which in random directions counts as their root.

    Args:
        decoder: The model.
        plain: What fp16 makes of it; what magnifies the rounding of fp16 magnifies that of fp32.
    """
    usual, _ = bounds(plain)
    if any(isinstance(module, EightBit) for module in decoder.modules()):
        # The last digit of a sum decides which of 256 numbers it becomes.
        return usual
    terms = max(decoder.spec.widest_sum, decoder.context)
    return min(usual * 2.0**-13 * math.sqrt(terms), MAX_RELATIVE_ERROR)


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
    digests: dict[PackedWeight, Digest] = {}

    def note(weight: PackedWeight, rows: torch.Tensor) -> None:
        digests.setdefault(weight, Digest()).add(rows)

    given = _given(unrounded, reading, reading.plan.unrounded, on_progress, note)
    weights = check_weights(
        unrounded.constants(),
        reading.contents,
        {
            weight: digest.content(weight.shape)
            for weight, digest in digests.items()
            if digest.rows == weight.rows
        },
        reading.parts,
    )
    compared = _compare(reading, reading.plan.unrounded, given, unrounded.head.count)
    bound = conversion_bound(decoder, reading.plain_fp16)
    result = Conversion(weights, len(compared.divergences), compared.relative_error, bound)
    if not result.passed:
        raise VerificationError(
            "The artifact is not the model: it holds the weights, but run without rounding its "
            f"largest logit error is {result.max_relative_error:.2e} of the largest logit (bound "
            f"{result.max_relative_error_bound:.1e}), {compared.worst}. Report the model.",
            result,
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
    # What all lengths compute has been seen there.
    passes = reading.plan.unrounded if conversion is None else reading.plan.declared
    given = _given(artifact, reading, passes, on_progress)
    compared = _compare(reading, passes, given, artifact.head.count)
    plain = reading.plain_fp16 if reading.in_fp16 else None
    error_bound, kl_bound = bounds(plain)
    result = Verification(
        runtime=artifact.label,
        text=reading.text,
        tokens=sum(call.count for part in passes for call in part.calls),
        last_position=max(part.start + part.count for part in passes) - 1,
        rows=len(compared.divergences),
        max_relative_error=compared.relative_error,
        mean_kl=float(compared.divergences.mean()),
        conversion=conversion,
        max_relative_error_bound=error_bound,
        mean_kl_bound=kl_bound,
        plain_fp16=plain,
    )
    if not result.passed:
        raise VerificationError(
            f"The artifact does not compute what the model computes: the largest logit error is "
            f"{result.max_relative_error:.2e} of the largest logit (bound {error_bound:.0e}), "
            f"{compared.worst}, and the mean KL divergence is {result.mean_kl:.2e} nats (bound "
            f"{kl_bound:.0e}).{_beside(plain)} Try --compute-precision fp32, and "
            "report the model if that fails too.",
            result,
        )
    return result


def _beside(plain: PlainFp16 | None) -> str:
    """Say what plain fp16 makes of the model."""
    if plain is None:
        return ""
    return (
        f" Plain fp16 makes {plain.max_relative_error:.2e} and {plain.mean_kl:.2e} nats of this "
        f"model, most of it in layer {plain.layer}."
    )


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


def _given(
    artifact: Runner,
    reading: ReadText,
    passes: Sequence[Pass],
    on_progress: Callable[[float], None],
    on_rows: OnRows = lambda weight, rows: None,
) -> list[list[torch.Tensor]]:
    """Return what an artifact gives in every call of every pass."""
    texts = []
    for part in passes:
        tokens = reading.tokens_of(part)
        chunks = [
            Chunk(part.start + call.first, tokens[call.first : call.end]) for call in part.calls
        ]
        texts.append(Sequenced(chunks, reading.later if part.start else None))
    if isinstance(artifact, ReferenceRunner):
        packed = sum(isinstance(value, PackedWeight) for _, value in artifact.constants())
        begun: set[PackedWeight] = set()

        def note(weight: PackedWeight, rows: torch.Tensor) -> None:
            if weight not in begun:
                artifact.page_out()
                on_progress(len(begun) / packed)
                begun.add(weight)
            on_rows(weight, rows)

        return artifact.read(texts, note)
    given = []
    for number, text in enumerate(texts):
        on_progress(number / len(texts))
        given.append(text.read_by(artifact))
    return given


def _compare(
    reading: ReadText,
    passes: Sequence[Pass],
    given: Sequence[Sequence[torch.Tensor]],
    count: int | None,
) -> _Compared:
    """Compare what was given in every call with what the model says.

    Args:
        reading: What it says.
        passes: The calls.
        given: Their rows of logits.
        count: How many there are of each row, see `Head`; None is all.
    """
    errors, sizes, divergences, places = [], [], [], []
    for part, calls in zip(passes, given, strict=True):
        for call, rows in zip(part.calls, calls, strict=True):
            first = call.end - len(rows)
            wanted = reading.rows(part.start, first, call.end)
            tokens = None
            if count is not None:
                tokens, wanted, rows, missed = _among(wanted, rows, count)
                errors.append(missed)
                places.append((part.start + first, call.count, "the likeliest tokens"))
                sizes.append(wanted.abs().max())
            error = (rows - wanted).abs()
            errors.append(error.max())
            sizes.append(wanted.abs().max())
            row, place = divmod(int(error.argmax()), error.shape[1])
            which = place if tokens is None else int(tokens[row, place])
            places.append((part.start + first + row, call.count, f"token {which}"))
            divergences.append(kl_divergence(wanted, rows))
    # max() of a tensor keeps NaN, as the bounds need; so does argmax.
    position, length, token = places[int(torch.stack(errors).argmax())]
    worst, largest = float(torch.stack(errors).max()), float(torch.stack(sizes).max())
    return _Compared(
        worst / largest if largest else worst,
        f"for {token} after position {position}, in a call with {length} tokens",
        torch.cat(divergences),
    )


def _among(
    wanted: torch.Tensor, rows: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what is compared of rows of which the likeliest tokens are given alone.

    Which of two tokens is chosen that are nearly alike is a matter of rounding. So the values are
    held against the model's of the same tokens, and what the model says of them against its own
    largest ones, in order: a token that is none of these is an error of as much as it lacks.

    Args:
        wanted: What the model says, `[rows, vocab]`.
        rows: What was given, -inf for all others.
        count: How many there are to be.

    Returns:
        The tokens, the model's logits of them and those that were given, `[rows, count]` each; and
        by how much the tokens miss the likeliest at most, which is infinite if they are fewer.
    """
    if bool(((rows != -math.inf).sum(-1) != count).any()):
        fewer = torch.tensor(math.inf)
    else:
        fewer = torch.tensor(0.0)
    # NaN is the largest of all to torch, so that none is left out.
    tokens = rows.topk(count, dim=-1).indices
    own = wanted.gather(-1, tokens)
    best = wanted.topk(count, dim=-1).values
    missed = (best - own.sort(-1, descending=True).values).abs().max()
    return tokens, own, rows.gather(-1, tokens), torch.maximum(missed, fewer)
