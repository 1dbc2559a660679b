"""Calls side by side give what calls in turn give, at one expansion of each weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from artifacts import Artifact
from llm_coreml.reference.program.constants import PackedWeight
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import Chunk, ReferenceRunner, Sequenced
from tiny import tokens_for

VOCABULARY, CONTEXT = 96, 32


@pytest.fixture(autouse=True)
def _everything_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_coreml.reference.program.constants._SMALL", 16)
    monkeypatch.setattr("llm_coreml.reference.program.constants._SLICE", 1 << 9)


def texts(runner: ReferenceRunner) -> list[Sequenced]:
    """Two texts, one of which begins late, over what another has left, is padded and goes back."""
    tokens = tokens_for(VOCABULARY, CONTEXT)
    runner.logits(tokens)
    left = {name: state.float() for name, state in runner.program.snapshot().items()}
    early, later = ((0, 8), (8, 8), (16, 1), (17, 1)), ((21, 1), (22, 8), (30, 2), (30, 1))
    first, late = (
        [Chunk(at, tokens[at : at + count]) for at, count in places] for places in (early, later)
    )
    return [Sequenced(first), Sequenced(late, left)]


@pytest.mark.parametrize("mode", ["declared", "fp32"])
def test_side_by_side_is_one_after_the_other(
    quantized: Callable[[str], Artifact], scheme_label: str, mode: str
) -> None:
    artifact = quantized(scheme_label)
    runner = ReferenceRunner(artifact.path, Execution(mode=mode, memory_budget=0))
    assert runner.program._compiled.in_place
    read = texts(runner)
    expected = [text.read_by(runner) for text in read]
    rows: Counter[PackedWeight] = Counter()

    def note(weight: PackedWeight, part: torch.Tensor) -> None:
        rows[weight] += len(part)

    found = runner.read(read, note)
    for calls, wanted in zip(found, expected, strict=True):
        for call, row in zip(calls, wanted, strict=True):
            # Sums in another order: rounded to fp16, the last bit of some is another.
            error = (call - row).abs().max() / row.abs().max()
            assert error <= (1e-6 if mode == "fp32" else 2e-3), error
    # Seven matrices of a layer and the head, each of them expanded once.
    assert len(rows) == 7 * len(artifact.decoder.layers) + 1
    assert all(count == weight.rows for weight, count in rows.items())
    assert not any(state.any() for state in runner.program.snapshot().values())


def test_states_that_are_not_written_in_place_are_not_shared(
    quantized: Callable[[str], Artifact],
) -> None:
    runner = ReferenceRunner(quantized("int4-channel").path, Execution(memory_budget=0))
    read = texts(runner)
    expected = [text.read_by(runner) for text in read]
    runner.program._compiled = replace(runner.program._compiled, in_place=False)

    def forbidden(weight: PackedWeight, part: torch.Tensor) -> None:
        raise AssertionError("side by side")

    for calls, wanted in zip(runner.read(read, forbidden), expected, strict=True):
        assert all(call.equal(row) for call, row in zip(calls, wanted, strict=True))
