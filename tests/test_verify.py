"""Verification itself: what it reads, and that it notices."""

from __future__ import annotations

from typing import final

import pytest
import torch

from llm_coreml.errors import VerificationError
from llm_coreml.runtime import Runner
from llm_coreml.verify import MAX_RELATIVE_ERROR, verification_passes, verify

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


def test_every_length_is_read_from_both_ends_and_the_context_is_read_to_its_end() -> None:
    passes = verification_passes((1, 8, 64), CONTEXT, CONTEXT)
    assert [part.lengths[:3] for part in passes] == [(64, 8, 1), (1, 8, 64), (1, 8, 64)]
    assert [part.start for part in passes[:2]] == [0, 0]
    assert passes[2].start + passes[2].count == CONTEXT
    assert verification_passes((1,), 32, 32)[2].start == 15
    assert all(part.count <= 5 for part in verification_passes((1, 8), 32, 5))


def test_equal_runners_pass_and_the_record_says_what_was_read() -> None:
    result = verify(Formula(), Formula(every_row=True), TOKENS, "held-out text")
    assert result.passed and result.max_relative_error == 0 and result.mean_kl == 0
    assert result.last_position == CONTEXT - 1
    assert result.rows == 3 * (3 + 16) and result.text == "held-out text"


# 0 is a one-token chunk, 72 the end of 64 + 8 + ..., CONTEXT - 1 the last decode.
@pytest.mark.parametrize("position", [0, 71, 80, CONTEXT - 1])
@pytest.mark.parametrize("error", [5 * MAX_RELATIVE_ERROR, float("nan"), float("inf")])
def test_one_wrong_logit_is_noticed(position: int, error: float) -> None:
    wrong = Formula(wrong_at=position, error=error)
    with pytest.raises(VerificationError, match="does not compute what the model computes"):
        verify(wrong, Formula(every_row=True), TOKENS, "text")


def test_an_error_within_the_bound_passes() -> None:
    wrong = Formula(wrong_at=0, error=MAX_RELATIVE_ERROR)
    result = verify(wrong, Formula(every_row=True), TOKENS, "text")
    assert 0 < result.max_relative_error < MAX_RELATIVE_ERROR
