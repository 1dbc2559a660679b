"""Calls side by side give what calls in turn give, bit by bit, at one expansion of each weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from artifacts import Artifact
from llm_coreml.reference.program.constants import PackedWeight
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import ReferenceRunner, Sequenced
from tiny import tokens_for

VOCABULARY, CONTEXT = 96, 32


@pytest.fixture(autouse=True)
def _everything_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_coreml.reference.program.constants._SMALL", 16)
    monkeypatch.setattr("llm_coreml.reference.program.constants._SLICE", 1 << 9)


def texts(runner: ReferenceRunner) -> list[Sequenced]:
    """Two texts, one of which begins late, over what another text has left."""
    tokens = tokens_for(VOCABULARY, CONTEXT)
    runner.logits(tokens)
    left = {name: state.float() for name, state in runner.program.snapshot().items()}
    first = Sequenced(0, [tokens[:8], tokens[8:16], tokens[16:17], tokens[17:18]])
    return [first, Sequenced(21, [tokens[5:6], tokens[6:14], tokens[14:15]], left)]


def one_by_one(runner: ReferenceRunner, text: Sequenced) -> list[torch.Tensor]:
    runner.reset(text.start)
    if text.states is not None:
        runner.resume(text.start, text.states)
    return [runner.step(chunk) for chunk in text.chunks]


@pytest.mark.parametrize("mode", ["declared", "fp32"])
def test_side_by_side_is_one_after_the_other(
    quantized: Callable[[str], Artifact], scheme_label: str, mode: str
) -> None:
    artifact = quantized(scheme_label)
    runner = ReferenceRunner(artifact.path, Execution(mode=mode, memory_budget=0))
    assert runner.program._compiled.in_place
    read = texts(runner)
    expected = [one_by_one(runner, text) for text in read]
    rows: Counter[PackedWeight] = Counter()

    def note(weight: PackedWeight, part: torch.Tensor) -> None:
        rows[weight] += len(part)

    found = runner.read(read, note)
    for calls, wanted in zip(found, expected, strict=True):
        for call, row in zip(calls, wanted, strict=True):
            assert call.equal(row)
    # Seven matrices of a layer and the head, each of them expanded once.
    assert len(rows) == 7 * len(artifact.decoder.layers) + 1
    assert all(count == weight.rows for weight, count in rows.items())
    assert not any(state.any() for state in runner.program.snapshot().values())


def test_states_that_are_not_written_in_place_are_not_shared(
    quantized: Callable[[str], Artifact],
) -> None:
    runner = ReferenceRunner(quantized("int4-channel").path, Execution(memory_budget=0))
    read = texts(runner)
    expected = [one_by_one(runner, text) for text in read]
    runner.program._compiled = replace(runner.program._compiled, in_place=False)

    def forbidden(weight: PackedWeight, part: torch.Tensor) -> None:
        raise AssertionError("side by side")

    for calls, wanted in zip(runner.read(read, forbidden), expected, strict=True):
        assert all(call.equal(row) for call, row in zip(calls, wanted, strict=True))
