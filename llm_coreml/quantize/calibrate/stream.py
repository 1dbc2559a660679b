"""A text on its way through a block of a decoder, halted wherever linear layers read.

    passage = Passage(block, texts, chunks(decoder))
    for names in SHARED_INPUTS:
        for inputs, others in passage.windows():           # what the layers `names` get
            ...
        passage.replace(names[0], weight)                  # before the text goes on
    texts = passage.end()

What a layer gives is computed once its weight has been replaced. Beside the text goes what it would
be without any quantized weight, so that the error made so far is known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.block import Block
from llm_coreml.decoder.chunk import Chunk
from llm_coreml.decoder.states import CacheView
from llm_coreml.quantize.formats.round import dense_rows

# Linear layers that get the same inputs, in the order in which a block computes them.
SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class Texts(NamedTuple):
    """Hidden states of every window, `[1, S, hidden]` each, between two blocks.

    Attributes:
        states: As the quantized blocks so far give them.
        originals: As the unquantized ones do.
    """

    states: list[torch.Tensor]
    originals: list[torch.Tensor]


class Passage:
    """The windows of a text in a block and in the block as it was.

    Args:
        block: Unquantized; its weights are copied, and kept as fp32.
        texts: What enters; it is taken out of the lists, to be freed once it is past.
        chunk_of: What a block is told of a window of so many tokens.
    """

    def __init__(self, block: nn.Module, texts: Texts, chunk_of: Callable[[int], Chunk]) -> None:
        original = widened(block)
        assert isinstance(original, Block)
        # The same weights, each of which may be replaced by another.
        self._block = copy.deepcopy(original, {id(w): w for w in original.parameters()})
        self._ours, self._theirs = (
            [_halts(form, states.pop(0), chunk_of, again) for _ in range(len(states))]
            for form, states, again in zip(
                (self._block, original), texts, (True, False), strict=True
            )
        )
        self._left = len(SHARED_INPUTS)
        self._originals: list[torch.Tensor] = []

    def weight(self, name: str) -> torch.Tensor:
        """Return the weight of a layer as it is by now, fp32 `[out, in]`."""
        return self._block.get_submodule(name).get_parameter("weight")

    def replace(self, name: str, weight: torch.Tensor) -> None:
        """Go on with another weight, quantized or not, in a layer."""
        values = torch.cat(list(dense_rows(weight)))
        self._block.get_submodule(name).weight = nn.Parameter(values, requires_grad=False)

    def windows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Go on to the next set of layers.

        Yields:
            For every window, what they get there and in the original, `[S, in_features]`.
        """
        self._left -= 1
        for ours, theirs in zip(self._ours, self._theirs, strict=True):
            yield next(ours)[0], next(theirs)[0]
            if not self._left:  # the widest inputs, and nothing will change what follows
                self._originals.append(next(theirs))
        if not self._left:
            self._theirs.clear()

    def end(self) -> Texts:
        """Return what leaves the block."""
        return Texts([next(ours) for ours in self._ours], self._originals)


@torch.inference_mode()
def _halts(
    block: Block, x: torch.Tensor, chunk_of: Callable[[int], Chunk], again: bool
) -> Iterator[torch.Tensor]:
    """Yield the inputs of each set of layers, and at last the block's output.

    With `again` the widest inputs are not kept, and computed twice: a text stays halted there.
    """
    inputs = block.input_layernorm(x)
    yield inputs
    inputs = block.self_attn.joined(inputs, chunk_of(x.shape[1]))
    yield inputs
    x = x + block.self_attn.o_proj(inputs)
    inputs = block.post_attention_layernorm(x)
    yield inputs
    if again:
        yield block.mlp.inner(inputs)
    inputs = block.mlp.inner(inputs)
    if not again:
        yield inputs
    x = x + block.mlp.down_proj(inputs)
    del inputs  # the next window needs the space
    yield x


def chunks(decoder: Decoder) -> Callable[[int], Chunk]:
    """Return a function from a number of tokens to what blocks are told of a window of so many.

    Blocks then attend to the window, and not to the rest of the cache.
    """
    known: dict[int, Chunk] = {}

    def chunk_of(length: int) -> Chunk:
        if length not in known:
            chunk = decoder.chunk(length, torch.zeros(1, dtype=torch.int64))
            keys, values = chunk.cache.keys[:, :, :length], chunk.cache.values[:, :, :length]
            mask = chunk.mask[..., :length].contiguous()
            known[length] = replace(chunk, mask=mask, cache=CacheView(keys, values))
        return known[length]

    return chunk_of


def widened(block: nn.Module) -> nn.Module:
    """Return a block of the same values whose weights are fp32; such weights are shared."""
    weights = {
        id(weight): nn.Parameter(torch.cat(list(dense_rows(weight))), requires_grad=False)
        for weight in block.parameters()
    }
    return copy.deepcopy(block, weights)
