"""The error of each layer, and what noise does, on a model whose layers a test changes."""

from __future__ import annotations

import copy

import pytest
import torch

from llm_coreml.errors import ConfigError
from llm_coreml.eval import by_layer
from llm_coreml.eval.by_layer import layer_errors, noise_floor
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from tiny import llama, save, tokens_for

TOKENS = tokens_for(97, 24)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> EagerRunner:
    folder = save(llama(num_hidden_layers=3), tmp_path_factory.mktemp("model"))
    return EagerRunner(build_original(open_model(folder), 32), "eager")


def test_streams_are_those_that_the_logits_come_from(original: EagerRunner) -> None:
    streams = list(original.streams(TOKENS))
    assert len(streams) == 3 and {tuple(each.shape) for each in streams} == {(24, 64)}
    assert torch.allclose(original.logits_of(streams[-1]), original.logits(TOKENS), atol=1e-4)
    # What is changed after a block goes on changed: twice the stream is not the stream twice.
    first, *_ = original.streams(TOKENS, lambda stream: 2 * stream)
    assert torch.equal(first, 2 * streams[0])
    *_, last = original.streams(TOKENS, lambda stream: 2 * stream)
    assert not torch.allclose(last, 2 * streams[-1], rtol=0.05)
    with pytest.raises(ConfigError, match="do not fit"):
        next(original.streams(TOKENS * 2))


def test_readers_side_by_side_leave_the_callers_mode(original: EagerRunner) -> None:
    """Of two modes that are left in the order of their beginning, the second stays."""
    readers = [original.streams(TOKENS) for _ in range(2)]
    for reader in readers:
        next(reader)
        assert torch.is_grad_enabled()
    for reader in readers:
        list(reader)
    assert torch.is_grad_enabled()


def test_a_layer_that_differs_is_told_from_those_before(original: EagerRunner) -> None:
    other = EagerRunner(copy.deepcopy(original.decoder), "other")
    mlp = other.decoder.block(1).mlp
    weight = next(p for name, p in mlp.named_parameters() if "down" in name)
    weight.data.mul_(1.1)
    found = layer_errors(original, other, TOKENS)
    theirs, ours = list(original.streams(TOKENS)), list(other.streams(TOKENS))
    assert [each.layer for each in found] == [0, 1, 2] and found[0].error == 0.0
    for each, one, two in zip(found, theirs, ours, strict=True):
        expected = (two - one).double().norm() / one.double().norm()
        assert each.error == pytest.approx(float(expected), rel=1e-6)
    assert found[1].error > 1e-3 and found[2].error > 1e-3


def test_the_floor_is_that_of_the_noise(
    original: EagerRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = (TOKENS[:12], TOKENS[10:])
    found = noise_floor(original, windows)
    assert found == noise_floor(original, windows)
    assert found.tokens == 24 and 0.9 <= found.top1_agreement <= 1
    assert 0 < found.mean_kl < found.p99_kl < 1e-2
    # A divergence grows with the square of what causes it.
    monkeypatch.setattr(by_layer, "_NOISE", 2.0**-7)
    assert noise_floor(original, windows).mean_kl == pytest.approx(16 * found.mean_kl, rel=0.2)
    monkeypatch.setattr(by_layer, "_NOISE", 0.0)
    still = noise_floor(original, windows)
    assert still.mean_kl == 0.0 and still.top1_agreement == 1.0
