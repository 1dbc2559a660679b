"""Verification itself: what it reads, and that it notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import final

import pytest
import torch

from artifacts import Artifact
from llm_coreml.decoder import Decoder
from llm_coreml.errors import VerificationError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner
from llm_coreml.verify.logits import conversion_bound, verify, verify_conversion
from llm_coreml.verify.passes import one_after_the_other, plan_passes
from llm_coreml.verify.reading import ReadText, read_text
from llm_coreml.verify.verification import (
    MAX_RELATIVE_ERROR,
    Conversion,
    PlainFp16,
    Verification,
)
from tiny import tokens_for

VOCABULARY = 16
CONTEXT = 128


@final
class Formula(Runner):
    """Logits that depend on token and position, with an error at one position."""

    def __init__(self, wrong_at: int = -1, error: float = 0.0, every_row: bool = False) -> None:
        super().__init__()
        self.context, self.vocab_size, self.label = CONTEXT, VOCABULARY, "formula"
        self.seq_lengths = (1, 8, 64)
        self.every_row = every_row
        self.wrong_at, self.error = wrong_at, error

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        positions = start_pos + torch.arange(tokens.shape[1])
        classes = torch.arange(VOCABULARY)
        phase = (tokens[0] + positions)[:, None] * (classes + 1)[None, :]
        logits = 4 * torch.sin(phase.to(torch.float32))
        logits[positions == self.wrong_at, 3] += self.error
        return logits[None] if self.every_row else logits[None, -1:]

    def _clear(self) -> None:
        pass


TOKENS = [(7 * n) % VOCABULARY for n in range(CONTEXT)]
PLAN = plan_passes((1, 8, 64), CONTEXT)


def read(every_row: bool = False, plain: PlainFp16 | None = None) -> ReadText:
    """What the formula says of a text, as a model would have read it."""
    part = PLAN.unrounded[-1]
    texts = {0: TOKENS, part.start: TOKENS[part.start :]}
    logits = {
        start: dict(enumerate(Formula(every_row=True).logits(tokens, start)))
        for start, tokens in texts.items()
    }
    return ReadText("held-out text", PLAN, TOKENS, logits, plain_fp16=plain)


READING = read()


def test_equal_runners_pass_and_the_record_says_what_was_read() -> None:
    result = verify(Formula(), READING)
    assert result.conversion is None and result.max_relative_error == 0 and result.mean_kl == 0
    assert result.last_position == CONTEXT - 1
    assert result.rows == (3 + 2) + (3 + 2 + 1) and result.text == "held-out text"


def test_what_ran_without_rounding_is_recorded_and_leaves_long_calls_out() -> None:
    plan = replace(PLAN, declared=(one_after_the_other(0, [8, 1]), PLAN.declared[-1]))
    conversion = Conversion(7, 33, 1e-7, 1e-5)
    result = verify(Formula(), replace(READING, plan=plan), conversion)
    assert result.to_json()["conversion"] == asdict(conversion)
    assert result.rows == 2 + (3 + 2 + 1) and result.last_position == CONTEXT - 1


def test_a_program_that_returns_every_row_has_every_row_compared() -> None:
    result = verify(Formula(every_row=True), read(every_row=True))
    assert result.rows == result.tokens == (64 + 8 + 3) + (3 + 3 + 15 + 1)
    # Position 40 is in the middle of a chunk of 64.
    with pytest.raises(VerificationError, match="for token 3 after position 40, in a call with 64"):
        verify(Formula(wrong_at=40, error=1.0, every_row=True), read(every_row=True))


# 63 is the end of 64 tokens, 74 of decoding after them, CONTEXT - 1 the last decode.
@pytest.mark.parametrize("position", [63, 71, 74, CONTEXT - 1])
@pytest.mark.parametrize("error", [5 * MAX_RELATIVE_ERROR, float("nan"), float("inf")])
def test_one_wrong_logit_is_noticed(position: int, error: float) -> None:
    wrong = Formula(wrong_at=position, error=error)
    with pytest.raises(VerificationError, match=f"after position {position}, in a call") as caught:
        verify(wrong, READING)
    assert isinstance(caught.value.found, Verification) and not caught.value.found.passed


def test_an_error_within_the_bound_passes() -> None:
    wrong = Formula(wrong_at=63, error=MAX_RELATIVE_ERROR)
    result = verify(wrong, READING)
    assert 0 < result.max_relative_error < MAX_RELATIVE_ERROR


# The formula's largest logit is 4.
@pytest.mark.parametrize(
    ("plain", "error", "passes"),
    [
        (None, 0.1, False),
        (PlainFp16(64, 1e-2, 1e-3, 3), 0.1, False),
        (PlainFp16(64, 2e-2, 1e-3, 3), 0.1, True),
        (PlainFp16(64, 2e-2, 1e-3, 3), 0.2, False),
        (PlainFp16(64, 5e-2, 1e-3, 3), 0.2, True),
        (PlainFp16(64, float("inf"), 1e-3, 3), 0.1, False),
        (PlainFp16(64, float("nan"), float("nan"), 3), 0.1, False),
        (PlainFp16(64, 5e-2, 1e-3, 3), float("inf"), False),
        (PlainFp16(64, 5e-2, 1e-3, 3), float("nan"), False),
        # No noise excuses another distribution.
        (PlainFp16(64, 9.0, 9.0, 3), 12.0, False),
    ],
)
def test_an_error_is_held_to_what_plain_fp16_makes_of_the_model(
    plain: PlainFp16 | None, error: float, passes: bool
) -> None:
    wrong, reading = Formula(wrong_at=63, error=error), read(plain=plain)
    if passes:
        result = verify(wrong, reading)
        assert result.plain_fp16 == plain and result.max_relative_error > MAX_RELATIVE_ERROR
        return
    with pytest.raises(VerificationError) as caught:
        verify(wrong, reading)
    assert (plain is None) != ("Plain fp16 makes" in str(caught.value))


def converted(artifact: Artifact, decoder: Decoder) -> Conversion:
    unrounded = ReferenceRunner(artifact.path, Execution(mode="fp32"))
    plan = plan_passes(unrounded.seq_lengths, decoder.context)
    tokens = tokens_for(decoder.spec.vocab_size, plan.tokens)
    reading = read_text(decoder, tokens, "text", plan, every_row=False, natural=True, in_fp16=False)
    return verify_conversion(unrounded, decoder, reading)


def test_every_format_converts_to_the_same_model(
    quantized: Callable[[str], Artifact], scheme_label: str
) -> None:
    artifact = quantized(scheme_label)
    result = converted(artifact, artifact.decoder)
    # Far from the bound, so that it can be trusted with wider sums.
    assert result.max_relative_error < result.max_relative_error_bound / 4
    # Seven matrices, three norms with three numbers each, token table, two RoPE tables, positions.
    tied, attention = artifact.plan.tied, artifact.decoder.layers[0].self_attn
    assert result.weights == 23 + (not tied) + (attention.form == "decomposed")


def test_the_bound_without_rounding_grows_with_the_root_of_the_widest_sum(
    quantized: Callable[[str], Artifact],
) -> None:
    decoder = quantized("int4-channel").decoder
    assert decoder.spec.layers[0].feed_forward.intermediate_size == 96
    assert conversion_bound(decoder) == pytest.approx(2e-2 / 8192 * 96**0.5)


def test_a_change_far_below_the_bound_of_fp16_is_noticed_without_rounding(
    quantized: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = quantized("int4-channel")
    whole = Decoder.leaving

    def almost(self: Decoder, products: torch.Tensor) -> torch.Tensor:
        return whole(self, products) * (1 + MAX_RELATIVE_ERROR / 100)

    monkeypatch.setattr(Decoder, "leaving", almost)
    with pytest.raises(
        VerificationError, match=r"is not the model: .* for token \d+ after position"
    ):
        converted(artifact, artifact.decoder)
