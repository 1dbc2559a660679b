"""The KV cache: the custom op, the in-place writes, and what a reset leaves."""

from __future__ import annotations

import pytest
import torch

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.states import KVCache, kv_write
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from tiny import llama, tokens_for


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


def test_eager_writes_equal_the_op() -> None:
    cache = KVCache(num_layers=3, num_key_value_heads=2, context=16, head_dim=4)
    keys, values = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    start = torch.tensor([7])
    found_keys, found_values = cache.open().update(1, keys, values, start)
    empty = torch.zeros(3, 2, 16, 4)
    assert torch.equal(cache.keys, kv_write(empty, keys, 1, start))
    assert torch.equal(cache.values, kv_write(empty, values, 1, start))
    assert torch.equal(found_keys, cache.keys[1:2])
    assert torch.equal(found_values, cache.values[1:2])


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
