"""The judge: texts read side by side say what each says alone, and late ones have a past."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from artifacts import UNQUANTIZED, Artifact
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.model import open_model
from llm_coreml.quantize.plan.plan import make_plan
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.verify.cached_text import CachedText, LaterCache
from llm_coreml.verify.judge import Reading, logits_of, read_together
from llm_coreml.verify.passes import plan_passes
from llm_coreml.verify.reading import read_text
from tiny import llama, mistral, tokens_for

CONTEXT = 32


def decoder_of(model: Any, **settings: Any) -> Decoder:
    opened = open_model(model)
    job = resolve(ExportConfig(**{"context": CONTEXT, **settings}), opened.spec)
    return build_decoder(opened, job, make_plan(job, opened.spec))


def read_late(
    decoder: Decoder, count: int, start: int, half: bool = False
) -> tuple[Reading, Reading, LaterCache]:
    """Read `count` tokens from position 0, and the text again from position `start` on."""
    tokens = tokens_for(decoder.spec.vocab_size, count)
    text = CachedText(decoder)
    later = LaterCache(decoder, text, start)
    late = [tokens[place % count] for place in range(start, decoder.context)]
    readings = Reading(0, tokens, text), Reading(start, late, CachedText(decoder, later))
    halves = [Reading(start, late, CachedText(decoder, later), half=True)] if half else []
    read_together(decoder, [*readings, *halves])
    return *readings, later


def test_what_is_read_together_is_what_each_text_says_alone(
    quantized: Callable[[str], Artifact], scheme_label: str
) -> None:
    decoder = quantized(scheme_label).decoder
    first, late, later = read_late(decoder, CONTEXT, start=20)
    tokens = tokens_for(decoder.spec.vocab_size, CONTEXT)
    # All its past is in the cache of a run from position 0, as programs round it.
    whole = EagerRunner(decoder, "").logits(tokens)
    torch.testing.assert_close(logits_of(decoder, [first.states])[0], whole, rtol=1e-4, atol=1e-5)
    found = logits_of(decoder, [late.states])[0]
    assert 0 < (found - whole[20:]).abs().max() < 1e-2 * whole.abs().max()
    for name, state in later.states.items():
        cached = dict(decoder.named_buffers())[name.replace("_", ".")]
        assert state.dtype is torch.float16 and not state[:, :, 20:].any()
        torch.testing.assert_close(
            state[:, :, :20].float(), cached[:, :, :20], rtol=1e-3, atol=1e-4
        )


def test_weights_are_the_same_afterwards(quantized: Callable[[str], Artifact]) -> None:
    decoder = quantized("int4-channel").decoder
    before = {name: id(weight) for name, weight in decoder.named_parameters()}
    plan = plan_passes((1, 8), CONTEXT)
    read_text(
        decoder, tokens_for(96, CONTEXT), "", plan, every_row=False, natural=True, in_fp16=True
    )
    assert {name: id(weight) for name, weight in decoder.named_parameters()} == before
    assert not any(module._forward_hooks for module in decoder.modules())


@pytest.mark.parametrize("config", [{}, {"attention_bias": True, "head_dim": 8}])
def test_a_short_text_stands_in_the_cache_again_and_again(config: dict[str, Any]) -> None:
    decoder = decoder_of(llama(num_hidden_layers=1, **config), **UNQUANTIZED)
    count, start = 5, 23
    first, late, later = read_late(decoder, count, start)
    # Nor does what is read in plain fp16 change it.
    again = read_late(decoder, count, start, half=True)[2]
    assert all(state.equal(again.states[name]) for name, state in later.states.items())
    assert first.states.shape[0] == count and late.states.shape[0] == CONTEXT - start
    # Keys and values of a first layer depend on token and position alone.
    tokens = tokens_for(decoder.spec.vocab_size, count)
    EagerRunner(decoder, "").logits([tokens[place % count] for place in range(start)])
    for name, state in later.states.items():
        cached = dict(decoder.named_buffers())[name.replace("_", ".")][:, :, :start]
        torch.testing.assert_close(state[:, :, :start].float(), cached, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("kinds", [["sliding_attention", "full_attention"], None])
def test_a_ring_holds_what_a_text_left_of_its_last_positions(kinds: list[str] | None) -> None:
    """In a program's own places: the decoder goes on from there as the judge does."""
    model = mistral(
        num_hidden_layers=2, sliding_window=9, layer_types=kinds, max_position_embeddings=96
    )
    decoder = decoder_of(model, context=96, seq_lengths=(1, 4, 8), **UNQUANTIZED)
    decoder.logits = "all"
    first, late, later = read_late(decoder, count=50, start=83)
    found = logits_of(decoder, [late.states])[0]
    rings = [state for state in decoder.states.values() if state.ring is not None]
    assert rings and len(decoder.states) == (1 if kinds is None else 2)
    for name, state in decoder.states.items():
        for part, buffer in state.named_buffers():
            assert later.states[f"{name}_{part}"].shape == buffer.shape
            buffer.copy_(later.states[f"{name}_{part}"])
    with torch.inference_mode():
        rows = decoder(torch.tensor([late.tokens]), torch.tensor([83]))[0]
    assert len(first.tokens) == 50 and len(late.tokens) == 13
    torch.testing.assert_close(rows, found, rtol=1e-4, atol=1e-5)


def test_without_a_past_there_are_zeros(quantized: Callable[[str], Artifact]) -> None:
    decoder = quantized("int4-channel").decoder
    plan, tokens = plan_passes((1, 8), CONTEXT), tokens_for(96, CONTEXT)
    reading = read_text(decoder, tokens, "", plan, every_row=True, natural=False, in_fp16=False)
    assert reading.later is None and reading.plain_fp16 is None
    late = plan.unrounded[-1]
    expected = EagerRunner(decoder, "").logits(reading.tokens_of(late), late.start)
    found = reading.rows(late.start, 0, late.count)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_long_texts_are_read_in_pieces(
    quantized: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = quantized("codebook-4").decoder
    whole = [reading.states for reading in read_late(decoder, CONTEXT, 20)[:2]]
    monkeypatch.setattr("llm_coreml.verify.judge._LONGEST", 7)
    for reading, expected in zip(read_late(decoder, CONTEXT, 20)[:2], whole, strict=True):
        torch.testing.assert_close(reading.states, expected, rtol=1e-4, atol=1e-5)


def plain(model: Any) -> Any:
    decoder = decoder_of(model, logits="all", **UNQUANTIZED)
    plan, tokens = plan_passes((1, 8), CONTEXT), tokens_for(decoder.spec.vocab_size, CONTEXT)
    found = read_text(decoder, tokens, "", plan, every_row=True, natural=True, in_fp16=True)
    return found.plain_fp16, tokens[:11]


def test_plain_fp16_errs_as_the_model_does_in_half() -> None:
    model = llama(num_hidden_layers=3, intermediate_size=96)
    found, tokens = plain(model)
    with torch.no_grad():
        exact = model(torch.tensor([tokens])).logits
        half = deepcopy(model).half()(torch.tensor([tokens])).logits.float()
    error = float((half - exact).abs().max() / exact.abs().max())
    assert found.rows == 11 + 6 and not found.noisy
    assert error / 2 < found.max_relative_error < 2 * error


def massive(layer: int, size: float) -> Any:
    """A model one of whose layers writes a huge number to the residual stream, another takes."""
    model = llama(num_hidden_layers=4, intermediate_size=96)
    with torch.no_grad():
        for index, sign in ((layer, 1.0), (layer + 1, -1.0)):
            projection = model.model.layers[index].mlp.down_proj
            gate, up = (getattr(model.model.layers[index].mlp, f"{n}_proj") for n in ("gate", "up"))
            gate.weight[0] = up.weight[0] = 0
            gate.weight[0, 0] = up.weight[0, 0] = 1
            projection.weight[:, 0] = 0
            projection.weight[7, 0] = sign * size
    return model


def test_the_layer_that_makes_most_of_the_noise_is_named() -> None:
    usual, _ = plain(massive(1, 1.0))
    found, _ = plain(massive(1, 3e4))
    assert found.max_relative_error > 4 * usual.max_relative_error and found.noisy
    assert found.layer in (1, 2)
