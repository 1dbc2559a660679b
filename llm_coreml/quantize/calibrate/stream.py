"""A text on its way through a block of a decoder, halted wherever linear layers read.

    passage = Passage(block, texts, decoder.window)
    for names in block.wiring.shared:
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
from typing import NamedTuple

import torch
from torch import nn

from llm_coreml.decoder.block import Block
from llm_coreml.decoder.chunk import Chunk
from llm_coreml.decoder.wiring import Steps
from llm_coreml.quantize.formats.round import dense_rows


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
        self._left = len(original.wiring.stages)
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

    With `again` the last inputs, the widest, are not kept, and computed twice: a text stays halted
    there.
    """
    steps = block.steps(x, chunk_of(x.shape[1]))
    del x
    halt = next(steps)
    for _ in block.wiring.stages[:-1]:
        inputs = halt()
        del halt  # and what the inputs were computed from
        yield inputs
        halt = steps.send(inputs)
        del inputs
    if again:
        yield halt()
    inputs = halt()
    del halt
    if not again:
        yield inputs
    output = _end(steps, inputs)
    del inputs  # the next window needs the space
    yield output


def _end(steps: Steps, inputs: torch.Tensor) -> torch.Tensor:
    """Return what a block gives once its last layers get their inputs."""
    try:
        steps.send(inputs)
    except StopIteration as done:
        output: torch.Tensor = done.value
        return output
    raise AssertionError("a block halts once for every stage of its wiring")


def widened(block: nn.Module) -> nn.Module:
    """Return a block of the same values whose weights are fp32; such weights are shared."""
    weights = {
        id(weight): nn.Parameter(torch.cat(list(dense_rows(weight))), requires_grad=False)
        for weight in block.parameters()
    }
    return copy.deepcopy(block, weights)
