"""The KV cache: the custom ops, the in-place writes, rings, and what a reset leaves."""

from __future__ import annotations

import pytest
import torch

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.caches import (
    Cache,
    KVCache,
    RingCache,
    held_positions,
    kv_write,
    ring_write,
)
from llm_coreml.decoder.spec import CacheSizes, Extent
from llm_coreml.decoder.state import Start
from llm_coreml.errors import ConfigError
from llm_coreml.model import open_model
from llm_coreml.quantize.fill import fill
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from tiny import llama, mistral, tokens_for


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    built = build_original(open_model(llama(num_hidden_layers=2)), context=32)
    built.logits = "all"
    return built


def cache_of(decoder: Decoder) -> KVCache:
    (cache,) = decoder.states.values()
    assert isinstance(cache, KVCache)
    return cache


def arguments(layer: int, length: int, first: int) -> tuple[object, ...]:
    cache = torch.arange(3 * 2 * 16 * 4, dtype=torch.float32).reshape(3, 2, 16, 4)
    update = -torch.ones(1, 2, length, 4)
    return cache, update, layer, torch.tensor([first], dtype=torch.int32)


@pytest.mark.parametrize(("layer", "length", "first"), [(0, 1, 0), (2, 5, 11), (1, 16, 0)])
def test_kv_write_is_a_well_formed_op(layer: int, length: int, first: int) -> None:
    torch.library.opcheck(torch.ops.llm_coreml.kv_write.default, arguments(layer, length, first))


@pytest.mark.parametrize(("layer", "length", "first"), [(0, 1, 0), (2, 5, 11), (1, 16, 0)])
def test_kv_write_changes_its_slice_and_nothing_else(layer: int, length: int, first: int) -> None:
    given = arguments(layer, length, first)
    cache = given[0]
    assert isinstance(cache, torch.Tensor)
    before = cache.clone()
    found = kv_write(*given)
    assert torch.equal(cache, before), "the input is left alone"
    before[layer, :, first : first + length] = -1
    assert torch.equal(found, before)


@pytest.mark.parametrize(("layer", "length", "first"), [(0, 1, 0), (2, 5, 13), (1, 8, 8)])
def test_ring_write_is_a_well_formed_op_that_goes_on_at_the_beginning(
    layer: int, length: int, first: int
) -> None:
    given = (*arguments(layer, length, first), length)
    torch.library.opcheck(torch.ops.llm_coreml.ring_write.default, given)
    cache = given[0]
    assert isinstance(cache, torch.Tensor)
    expected = cache.clone()
    for offset in range(length):
        expected[layer, :, (first + offset) % 16] = -1
    assert torch.equal(ring_write(*given), expected)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("kind", "window"), [(KVCache, None), (RingCache, 9)])
def test_eager_writes_equal_the_op(kind: type[Cache], window: int | None, joint: bool) -> None:
    extent = Extent(64, longest=8)
    cache = kind(3, CacheSizes(2, 4, window), extent, joint=joint)
    keys, values = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    start = Start(torch.tensor([29]), 5)
    empty = [torch.zeros_like(buffer) for buffer in cache.buffers()]
    found_keys, found_values = cache.open(start).update(1, keys, values)
    packed = cache.packed(keys, values)
    for buffer, before, entries in zip(cache.buffers(), empty, packed, strict=True):
        assert torch.equal(buffer, cache.written(before, entries, 1, start))
    rows = [buffer[1:2] for buffer in cache.buffers()]
    assert all(map(torch.equal, (found_keys, found_values), cache.parted(rows)))
    places = (29 + torch.arange(5)) % cache.read
    assert torch.equal(found_keys[:, :, places], keys)
    assert torch.equal(found_values[:, :, places], values)
    assert int((found_keys != 0).any(-1).sum()) == 2 * 5


def test_a_ring_is_as_long_as_a_call_and_what_its_first_token_sees() -> None:
    for window, longest, ring in ((512, 512, 1024), (512, 1, 512), (4096, 512, 4608), (8, 64, 128)):
        assert CacheSizes(1, 32, window).ring(Extent(8192, longest=longest)) == ring
    assert CacheSizes(1, 32, 512).ring(Extent(1024, longest=512)) is None, "it would save nothing"
    assert CacheSizes(1, 32, 512).ring(Extent(8192)) is None, "calls are as long as the context"
    assert CacheSizes(1, 32, None).ring(Extent(8192, longest=1)) is None


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 8), (5, 8), (30, 8), (61, 3), (96, 8)])
def test_held_positions_are_those_that_were_written_last(start: int, length: int) -> None:
    held = torch.full((32,), 10**6)
    for position in range(start + length):
        held[position % 32] = position
    found = held_positions(
        torch.arange(32, dtype=torch.int32),
        torch.tensor([start % 32], dtype=torch.int32),
        torch.tensor([start], dtype=torch.int32),
        length,
        Extent(128),
    )
    written = held < 10**6
    assert torch.equal(found[written].to(torch.int64), held[written])
    assert (found[~written] >= 128).all(), "what was never written is beyond all positions"


@torch.inference_mode()
def test_chunks_fill_the_cache_as_one_call_does(decoder: Decoder) -> None:
    tokens = torch.tensor([tokens_for(97, 32)])
    decoder.reset()
    decoder(tokens, torch.tensor([0]))
    whole = cache_of(decoder).keys.clone(), cache_of(decoder).values.clone()
    decoder.reset()
    for first, last in ((0, 1), (1, 20), (20, 32)):
        decoder(tokens[:, first:last], torch.tensor([first]))
    assert torch.allclose(cache_of(decoder).keys, whole[0], atol=1e-5)
    assert torch.allclose(cache_of(decoder).values, whole[1], atol=1e-5)


@torch.inference_mode()
def test_reset_and_a_fresh_start_forget_the_sequence_before(decoder: Decoder) -> None:
    old, new = torch.tensor([tokens_for(97, 32, 1)]), torch.tensor([tokens_for(97, 9, 2)])
    start = torch.tensor([0])
    decoder.reset()
    expected = decoder(new, start).clone()
    decoder(old, start)
    # What lies past the current position is masked, so a restart needs no reset to be right.
    assert torch.equal(decoder(new, start), expected)
    decoder(old, start)
    decoder.reset()
    assert not cache_of(decoder).keys.any() and not cache_of(decoder).values.any()
    assert torch.equal(decoder(new, start), expected)


def test_a_sequence_goes_back_as_far_as_rings_remember_or_is_read_again() -> None:
    model = open_model(mistral(num_hidden_layers=2, sliding_window=9))
    decoder = Decoder(model.spec, 96, longest=8)
    fill(decoder, model.weights, plan=None, storage=None)
    runner, tokens = EagerRunner(decoder.eval(), "eager"), tokens_for(97, 80)
    assert runner.rewinds == 32 - 9 + 1
    whole = runner.logits(tokens)
    runner.rewind(80 - 24)
    assert torch.allclose(runner.feed(tokens[56:60]), whole[59], atol=1e-5)
    with pytest.raises(ConfigError, match=r"80 positions have been written.*the last 24 of them"):
        runner.rewind(55)
    # What was read of another ending is behind, and may not be gone on from.
    again = [*tokens[:55], 1, 2, 3]
    found = list(runner.generate(again, 4, reuse=True))
    runner.reset()
    assert found == list(runner.generate(again, 4))
