"""Verification itself: what it reads, and that it notices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import final

import pytest
import torch

from artifacts import Artifact
from llm_coreml.decoder import Decoder
from llm_coreml.errors import VerificationError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner
from llm_coreml.verify.logits import (
    MAX_RELATIVE_ERROR,
    Conversion,
    ReadText,
    conversion_bound,
    verification_passes,
    verify,
    verify_conversion,
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


def read(every_row: bool = False) -> ReadText:
    def judge(tokens: Sequence[int], start: int, rows: Sequence[int]) -> torch.Tensor:
        return Formula(every_row=True).logits(tokens, start)[list(rows)]

    return ReadText(judge, TOKENS, "held-out text", (1, 8, 64), CONTEXT, every_row)


READING = read()


def test_every_length_is_read_from_both_ends_and_the_context_is_read_to_its_end() -> None:
    passes = verification_passes((1, 8, 64), CONTEXT, CONTEXT)
    assert [part.lengths[:3] for part in passes] == [(64, 8, 1), (1, 8, 64), (1, 8, 64)]
    assert [part.start for part in passes[:2]] == [0, 0]
    assert passes[2].start + passes[2].count == CONTEXT
    assert verification_passes((1,), 32, 32)[2].start == 29
    assert all(part.count <= 5 for part in verification_passes((1, 8), 32, 5))


def test_equal_runners_pass_and_the_record_says_what_was_read() -> None:
    result = verify(Formula(), READING)
    assert result.conversion is None and result.max_relative_error == 0 and result.mean_kl == 0
    assert result.last_position == CONTEXT - 1
    assert result.rows == 3 * (3 + 2) and result.text == "held-out text"


def test_what_ran_without_rounding_is_recorded_and_leaves_two_passes_to_read() -> None:
    conversion = Conversion(7, 33, 1e-7, 1e-5)
    result = verify(Formula(), READING, conversion)
    assert result.to_json()["conversion"] == asdict(conversion)
    assert result.rows == 2 * (3 + 2) and result.last_position == CONTEXT - 1


def test_a_program_that_returns_every_row_has_every_row_compared() -> None:
    result = verify(Formula(every_row=True), read(every_row=True))
    assert result.rows == result.tokens == 3 * (1 + 8 + 64 + 2)
    # Position 40 is in the middle of a chunk of 64.
    with pytest.raises(VerificationError, match="for token 3 after position 40, in a call of"):
        verify(Formula(wrong_at=40, error=1.0, every_row=True), read(every_row=True))


def test_some_rows_of_the_eager_model_are_those_of_all(
    quantized: Callable[[str], Artifact],
) -> None:
    eager = EagerRunner(quantized("int4-channel").decoder, "")
    tokens, rows = tokens_for(96, 20), [0, 7, 19]
    torch.testing.assert_close(eager.at(tokens, 5, rows), eager.logits(tokens, 5)[rows])


# 0 is a one-token chunk, 72 the end of 64 + 8 + ..., CONTEXT - 1 the last decode.
@pytest.mark.parametrize("position", [0, 71, 74, CONTEXT - 1])
@pytest.mark.parametrize("error", [5 * MAX_RELATIVE_ERROR, float("nan"), float("inf")])
def test_one_wrong_logit_is_noticed(position: int, error: float) -> None:
    wrong = Formula(wrong_at=position, error=error)
    with pytest.raises(VerificationError, match=f"after position {position}, in a call"):
        verify(wrong, READING)


def test_an_error_within_the_bound_passes() -> None:
    wrong = Formula(wrong_at=0, error=MAX_RELATIVE_ERROR)
    result = verify(wrong, READING)
    assert 0 < result.max_relative_error < MAX_RELATIVE_ERROR


def converted(artifact: Artifact, decoder: Decoder) -> Conversion:
    tokens = tokens_for(decoder.spec.vocab_size, decoder.context)
    unrounded = ReferenceRunner(artifact.path, Execution(mode="fp32"))
    judge, context = EagerRunner(decoder, "").at, decoder.context
    reading = ReadText(judge, tokens, "text", unrounded.seq_lengths, context, every_row=False)
    return verify_conversion(unrounded, decoder, reading)


def test_every_format_converts_to_the_same_model(
    quantized: Callable[[str], Artifact], scheme_label: str
) -> None:
    artifact = quantized(scheme_label)
    result = converted(artifact, artifact.decoder)
    # Far from the bound, so that it can be trusted with wider sums.
    assert result.max_relative_error < result.max_relative_error_bound / 4
    # Seven matrices, three norms with two numbers each, token table, two RoPE tables, positions.
    tied, attention = artifact.plan.tied, artifact.decoder.layers[0].self_attn
    assert result.weights == 20 + (not tied) + (attention.form == "decomposed")


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
    whole = EagerRunner._head

    def almost(self: EagerRunner, x: torch.Tensor) -> torch.Tensor:
        return whole(self, x) * (1 + MAX_RELATIVE_ERROR / 100)

    monkeypatch.setattr(EagerRunner, "_head", almost)
    with pytest.raises(
        VerificationError, match=r"is not the model: .* for token \d+ after position"
    ):
        converted(artifact, artifact.decoder)
