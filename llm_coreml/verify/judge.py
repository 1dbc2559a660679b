"""What the quantized model itself says of a text: the judge of every artifact, in eager PyTorch.

    texts = [Reading(0, tokens, cached), Reading(949, more, CachedText(decoder, later))]
    read_together(decoder, texts)
    texts[0].states                       # float32 [S, hidden], before the last norm
    logits_of(decoder, texts[0].states[rows])

All texts go through the decoder side by side, one stage of matrices after the other, so that each
matrix is expanded once, and no more than a stage's at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.block import Block
from llm_coreml.decoder.wiring import Steps
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.verify.cached_text import CachedText
from llm_coreml.verify.halves import PlainHalf, half_of, plain_half

# Bounds the size of attention scores.
_LONGEST = 1024


class Reading:
    """A text on its way through a decoder.

    Args:
        start: Position of its first token.
        tokens: What is read.
        cached: What the caches hold of it.
        half: Whether it is read in plain fp16, see `halves`; such texts come after all others.

    Attributes:
        states: What the last block gave, float32 `[S, hidden]`.
    """

    def __init__(
        self, start: int, tokens: Sequence[int], cached: CachedText, *, half: bool = False
    ) -> None:
        self.start = start
        self.tokens = tuple(tokens)
        self.half = half
        self.states = torch.empty(0)
        self._cached = cached

    def enter(self, decoder: Decoder) -> None:
        """Take the tokens' rows of the table, without expanding it as a whole."""
        tokens, first = torch.tensor(self.tokens), 0
        table = decoder.embed_tokens.weight
        self.states = torch.empty(len(tokens), table.shape[1])
        for rows in dense_rows(table):
            inside = (tokens >= first) & (tokens < first + len(rows))
            self.states[inside] = rows[tokens[inside] - first]
            first += len(rows)
        self.states = decoder.entering(half_of(self.states) if self.half else self.states)

    def steps(self, decoder: Decoder, block: Block) -> Iterator[Steps]:
        """Yield the steps of a block for every chunk of the text, in order."""
        for first in range(0, len(self.tokens), _LONGEST):
            x = self.states[None, first : first + _LONGEST]
            chunk = decoder.reading(x.shape[1], self.start + first, self._cached.views)
            yield block.steps(x, chunk)


@torch.no_grad()
def read_together(
    decoder: Decoder, texts: Sequence[Reading], on_layer: Callable[[], None] = lambda: None
) -> None:
    """Read all texts.

    Args:
        decoder: Quantized; its weights are the same afterwards.
        texts: What later ones find in their caches comes before them.
        on_layer: Called after every block, when `states` are what it gave.
    """
    with plain_half(decoder) as half:
        for text in texts:
            text.enter(decoder)
        for index in range(len(decoder.layers)):
            _through(decoder, decoder.block(index), texts, half)
            on_layer()


def _through(decoder: Decoder, block: Block, texts: Sequence[Reading], half: PlainHalf) -> None:
    passages = []
    for text in texts:
        with half if text.half else nullcontext():
            passages += [_Passage(text, steps) for steps in text.steps(decoder, block)]
    for text in texts:
        text.states = text.states[:0]
    for names in block.wiring.shared:
        with _expanded(block, names) as weights:
            rounded = False
            for passage in passages:
                if passage.text.half and not rounded:
                    for weight in weights:
                        weight.copy_(half_of(weight))
                    rounded = True
                with half if passage.text.half else nullcontext():
                    passage.advance()
    for passage in passages:
        passage.text.states = torch.cat((passage.text.states, passage.inputs[0]))


class _Passage:
    """A chunk of a text, halted before a stage of a block's matrices.

    Attributes:
        text: Whose chunk it is.
        inputs: What the matrices get, and at last what the block gives.
    """

    def __init__(self, text: Reading, steps: Steps) -> None:
        self.text = text
        self.inputs = next(steps)()
        self._steps = steps

    def advance(self) -> None:
        """Go on to the next stage, whatever lies between."""
        try:
            halt = self._steps.send(self.inputs)
        except StopIteration as done:
            self.inputs = done.value
            return
        self.inputs = halt()


@contextmanager
def _expanded(block: nn.Module, names: Sequence[str]) -> Iterator[list[torch.Tensor]]:
    """Give modules of a block their weights as fp32 for a while."""
    found = []
    with ExitStack() as stack:
        for name in names:
            module = block.get_submodule(name)
            stored = module.get_parameter("weight")
            stack.callback(setattr, module, "weight", stored)
            dense = torch.cat(list(dense_rows(stored)))
            module.weight = nn.Parameter(dense, requires_grad=False)
            found.append(dense)
        yield found


@torch.no_grad()
def logits_of(decoder: Decoder, states: torch.Tensor, *, half: bool = False) -> torch.Tensor:
    """Return the logits of what the last block gave, without expanding the head as a whole.

    Args:
        decoder: As above.
        states: float32 `[rows, hidden]`.
        half: Whether they are computed in plain fp16.

    Returns:
        float32 `[rows, vocab]`.
    """
    products = []
    with plain_half(decoder) as mode:
        with mode if half else nullcontext():
            x = decoder.norm(states)
        for part in dense_rows(decoder.lm_head.weight):
            product = F.linear(x, half_of(part) if half else part)
            products.append(half_of(product) if half else product)
        with mode if half else nullcontext():
            return decoder.leaving(torch.cat(products, -1))
