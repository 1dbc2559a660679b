"""Wrong padding is noticed: verification makes calls that are no length, as runners do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from artifacts import UNQUANTIZED, lower
from llm_coreml.config import ExportConfig
from llm_coreml.errors import ArtifactError, VerificationError
from llm_coreml.lower.padded import Padded, padded_length, position
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.verify.logits import verify_conversion
from llm_coreml.verify.passes import plan_passes
from llm_coreml.verify.reading import read_text
from tiny import llama, tokens_for

Forward = Callable[[Padded, torch.Tensor, torch.Tensor], torch.Tensor]


def other_pads(self: Padded, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Pad with the first tokens, not with the last one."""
    return padded(self, tokens, start, again=True)


def pads_of_their_own(self: Padded, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Let every pad stand at a position of its own."""
    return padded(self, tokens, start, own=True)


def padded(
    self: Padded,
    tokens: torch.Tensor,
    start: torch.Tensor,
    again: bool = False,
    own: bool = False,
) -> torch.Tensor:
    """Pad as the method does, or otherwise."""
    assert self.lengths is not None
    count = tokens.shape[1]
    length = padded_length(count, self.lengths)
    rows = torch.arange(length)
    rows = rows % count if again else rows.clamp(max=count - 1)
    first = position(self.positions, start)
    # No look-up: it would refuse what lies beyond the context.
    last = (start + ((length if own else count) - 1)).to(torch.int32)
    return self.program(tokens.index_select(1, rows).to(torch.int32), first, last)


WRONG: dict[str, Forward] = {
    "right": padded,
    "other tokens": other_pads,
    "positions of their own": pads_of_their_own,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_padding_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Padded, "forward", WRONG[name])
    config = ExportConfig(context=32, seq_lengths=(1, 8), **UNQUANTIZED)
    artifact = lower(llama(), config, tmp_path / "model.pte")
    decoder = artifact.decoder
    plan = plan_passes((1, 8), decoder.context)
    tokens = tokens_for(decoder.spec.vocab_size, plan.tokens)
    reading = read_text(decoder, tokens, "", plan, every_row=False, natural=True, in_fp16=True)
    runner = ReferenceRunner(artifact.path, Execution(mode="fp32"))
    if name == "right":
        assert verify_conversion(runner, decoder, reading).passed
        return
    # At the end of the context, positions of their own are none.
    noticed = "in a call with 3 tokens|reads or writes index 3[0-9] of 32"
    with pytest.raises((VerificationError, ArtifactError), match=noticed):
        verify_conversion(runner, decoder, reading)
