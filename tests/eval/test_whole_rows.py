"""A program that gives last rows is read in chunks, and each proof can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_coreml import export
from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.config import ExportConfig
from llm_coreml.eval.whole_rows import whole_rows
from llm_coreml.reference.program import widened
from llm_coreml.runtime.every_row import EveryRow, pads, prove
from llm_coreml.runtime.reference import ReferenceRunner
from tiny import llama

TOKENS = [(7 * at + at * at) % 250 for at in range(29)]


@pytest.fixture
def runner(bundle: Path) -> ReferenceRunner:
    opened = open_bundle(bundle)
    found = ReferenceRunner(opened.program, description=opened.manifest.description)
    assert not found.every_row
    return found


def test_rows_are_those_of_one_token_at_a_time(runner: ReferenceRunner) -> None:
    reader = EveryRow(runner)
    assert pads(runner)
    assert prove(reader, runner, TOKENS) is None
    slow = runner.logits(TOKENS)
    fast = reader.logits(TOKENS)
    assert fast.shape == slow.shape == (len(TOKENS), runner.vocab_size)
    # Sums of fp32 come in another order, and are rounded to fp16 then.
    assert (fast - slow).abs().max() < 2e-2 * slow.abs().max()
    assert torch.equal(reader.logits(TOKENS), fast)
    # The program itself reads on as if nothing had been.
    assert torch.equal(runner.logits(TOKENS), slow)


def test_chunks_are_as_long_as_the_program_takes(runner: ReferenceRunner) -> None:
    reader = whole_rows(runner, TOKENS)
    assert isinstance(reader, EveryRow)
    calls: list[int] = []
    forward = reader._forward

    def counted(tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        calls.append(tokens.shape[1])
        return forward(tokens, start_pos)

    reader._forward = counted  # type: ignore[method-assign]
    reader.logits(TOKENS)
    longest = runner.seq_lengths[-1]
    assert calls == [longest] * (29 // longest) + [29 % longest]


def test_a_row_that_is_not_the_programs_own_is_noticed(
    runner: ReferenceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = EveryRow(runner)
    forward = reader._forward

    def wrong(tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        rows = forward(tokens, start_pos).clone()
        rows[0, -1, 3] += 1e-3
        return rows

    reader._forward = wrong  # type: ignore[method-assign]
    told = prove(reader, runner, TOKENS)
    assert told is not None and "another than the program's own, by up to 0.00" in told


def test_what_is_not_proved_is_read_slowly_and_told(
    runner: ReferenceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(
        "llm_coreml.eval.whole_rows.prove", lambda *_: "row 7 is another than the program's own"
    )
    assert whole_rows(runner, TOKENS, notes.append) is runner
    (note,) = notes
    assert "row 7" in note and "one token at a time" in note and "--logits all" in note


def test_a_program_without_such_a_slice_is_read_slowly(
    runner: ReferenceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widened, "_takes_last", lambda *_: False)
    notes: list[str] = []
    assert whole_rows(runner, TOKENS, notes.append) is runner
    assert "no last row" in notes[0]


@pytest.mark.parametrize(
    ("split", "fast"), [(("embedding",), True), (("embedding", "head"), False)]
)
def test_several_programs_in_a_row(split: tuple[str, ...], fast: bool, tmp_path: Path) -> None:
    """Where the head is a program of its own, the rows of the one before it are no logits."""
    config = ExportConfig(
        context=64, seq_lengths=(1, 8), split=split, scheme="none", embedding="none"
    )
    made = export(llama(), output=tmp_path / "out", config=config, cache=False)
    found = open_runner(open_bundle(made.folder))
    assert isinstance(found, ReferenceRunner) and not found.every_row
    text = [token % found.vocab_size for token in TOKENS]
    notes: list[str] = []
    reader = whole_rows(found, text, notes.append)
    assert isinstance(reader, EveryRow) == fast and bool(notes) != fast
    rows, slow = reader.logits(text), found.logits(text)
    assert (rows - slow).abs().max() < 2e-2 * slow.abs().max()
