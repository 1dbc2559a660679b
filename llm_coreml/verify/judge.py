"""What the quantized model itself says of a text: the judge of every artifact, in eager PyTorch.

    texts = [Reading(0, tokens, cached), Reading(949, more, CachedText(decoder, later))]
    read_together(decoder, texts)
    texts[0].states                       # float32 [S, hidden], before the last norm
    logits_of(decoder, [texts[0].states[rows]])

All texts go through the decoder side by side, one stage of matrices after the other, so that each
matrix is expanded once, and no more than a stage's at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.block import Block
from llm_coreml.decoder.decoder import LookUp
from llm_coreml.decoder.matrices import Embedding
from llm_coreml.decoder.wiring import Steps
from llm_coreml.quantize.formats.round import dense_rows, one_row
from llm_coreml.verify.cached_text import CachedText
from llm_coreml.verify.halves import PlainHalf, half_of, plain_half, round_to_half

# Called with a matrix's name in the decoder and its next rows, fp32.
OnWeight = Callable[[str, torch.Tensor], None]
# Bounds the size of attention scores.
_LONGEST = 1024
# Elements of a matrix that are expanded at a time: few enough to stay near the core.
_PIECE = 1 << 20


def ignore_weight(_name: str, _rows: torch.Tensor) -> None:
    """Do nothing with a weight."""


class Reading:
    """A text on its way through a decoder.

    Args:
        start: Position of its first token.
        tokens: What is read.
        cached: What the caches hold of it.
        half: Whether it is read in plain fp16, see `halves`; such texts come after all others.

    Attributes:
        states: What the last block gave, float32 `[S, hidden]`; between blocks as `Layout` has it.
    """

    def __init__(
        self, start: int, tokens: Sequence[int], cached: CachedText, *, half: bool = False
    ) -> None:
        self.start = start
        self.tokens = tuple(tokens)
        self.half = half
        self.states = torch.empty(0)
        self._cached = cached

    def steps(self, decoder: Decoder, block: Block) -> Iterator[Steps]:
        """Yield the steps of a block for every chunk of the text, in order."""
        for first in range(0, len(self.tokens), _LONGEST):
            x = self.states[None, first : first + _LONGEST]
            chunk = decoder.reading(x.shape[1], self.start + first, self._cached.views)
            yield block.steps(x, chunk)


@torch.no_grad()
def read_together(
    decoder: Decoder,
    texts: Sequence[Reading],
    on_layer: Callable[[], None] = lambda: None,
    on_weight: OnWeight = ignore_weight,
) -> None:
    """Read all texts.

    Args:
        decoder: Quantized; its weights are the same afterwards.
        texts: What later ones find in their caches comes before them.
        on_layer: Called after every block, when `states` are what it gave.
        on_weight: Called with every matrix of the blocks.
    """
    room = _Room()
    with plain_half(decoder) as half:
        _enter(decoder, texts, half, room, on_weight)
        for index in range(len(decoder.layers)):
            _through(decoder, index, texts, half, room, on_weight)
            on_layer()


def _enter(
    decoder: Decoder,
    texts: Sequence[Reading],
    half: PlainHalf,
    room: _Room,
    on_weight: OnWeight,
) -> None:
    """Read the tokens, without expanding a table as a whole."""
    named = [] if decoder.per_layer is None else ["per_layer.projection"]
    with _expanded(decoder, named, room, "", on_weight) as weights:
        for text in [text for text in texts if not text.half]:
            tokens, first = torch.tensor([text.tokens]), torch.tensor([text.start])
            text.states = decoder.embed(tokens, first, look_up=_look_up)[0]
        for weight in weights:
            weight.copy_(half_of(weight))
        for text in [text for text in texts if text.half]:
            tokens, first = torch.tensor([text.tokens]), torch.tensor([text.start])
            rounded = {table: half_of(_look_up(table, tokens)) for table in decoder.tables}
            with half:
                text.states = decoder.embed(tokens, first, look_up=_rows_of(rounded))[0]


def _rows_of(rows: Mapping[Embedding, torch.Tensor]) -> LookUp:
    return lambda table, _: rows[table]


def _look_up(table: Embedding, tokens: torch.Tensor) -> torch.Tensor:
    found, places = torch.unique(tokens[0], return_inverse=True)
    return torch.cat([one_row(table.weight, token) for token in found.tolist()])[places][None]


def _through(
    decoder: Decoder,
    index: int,
    texts: Sequence[Reading],
    half: PlainHalf,
    room: _Room,
    on_weight: OnWeight,
) -> None:
    block, passages = decoder.block(index), []
    for text in texts:
        with half if text.half else nullcontext():
            passages += [_Passage(text, steps) for steps in text.steps(decoder, block)]
    for text in texts:
        text.states = torch.empty(0)
    for names in block.wiring.shared:
        with _expanded(block, names, room, f"layers.{index}.", on_weight) as weights:
            rounded = False
            for passage in passages:
                if passage.text.half and not rounded:
                    for weight in weights:
                        round_to_half(weight, _PIECE)
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


class _Room:
    """Memory for the matrices of a stage, which the next stage uses again.

    Fresh memory costs more time than what is written to it.
    """

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    def matrices(self, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
        """Return matrices of these shapes, of any values."""
        sizes = [math.prod(shape) for shape in shapes]
        if sum(sizes) > len(self._numbers):
            self._numbers = torch.empty(sum(sizes))
        parts = torch.split(self._numbers[: sum(sizes)], sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@contextmanager
def _expanded(
    block: nn.Module, names: Sequence[str], room: _Room, prefix: str, on_weight: OnWeight
) -> Iterator[list[torch.Tensor]]:
    """Give modules of a block their weights as fp32 for a while."""
    modules = [block.get_submodule(name) for name in names]
    stored = [module.get_parameter("weight") for module in modules]
    found = room.matrices([weight.shape for weight in stored])
    with ExitStack() as stack:
        for name, module, weight, dense in zip(names, modules, stored, found, strict=True):
            at = 0
            for rows in dense_rows(weight, _PIECE):
                on_weight(f"{prefix}{name}.weight", rows)
                dense[at : at + len(rows)] = rows
                at += len(rows)
            stack.callback(setattr, module, "weight", weight)
            module.weight = nn.Parameter(dense, requires_grad=False)
        yield found


@torch.no_grad()
def logits_of(
    decoder: Decoder,
    states: Sequence[torch.Tensor],
    halves: Sequence[torch.Tensor] = (),
    on_weight: OnWeight = ignore_weight,
) -> list[torch.Tensor]:
    """Return the logits of what the last block gave, without expanding the head as a whole.

    Args:
        decoder: As above.
        states: float32 `[rows, hidden]` each.
        halves: Further ones, whose logits are computed in plain fp16.
        on_weight: Called with rows of the head.

    Returns:
        float32 `[rows, vocab]` for each of `states`, then of `halves`.
    """
    with plain_half(decoder) as mode:
        inputs = [decoder.norm(x) for x in states]
        with mode:
            inputs += [decoder.norm(x) for x in halves]
        # Whole results first: small tensors between large ones would leave gaps in the heap.
        head, at = decoder.lm_head.weight, 0
        products = [x.new_empty(len(x), len(head)) for x in inputs]
        for rows in dense_rows(head, _PIECE):
            on_weight("lm_head.weight", rows)
            for x, found in zip(inputs[: len(states)], products, strict=False):
                found[:, at : at + len(rows)] = F.linear(x, rows)
            if halves:
                rows = half_of(rows)
            for x, found in zip(inputs[len(states) :], products[len(states) :], strict=True):
                found[:, at : at + len(rows)] = half_of(F.linear(x, rows))
            at += len(rows)
        logits = []
        for number, found in enumerate(products):
            with nullcontext() if number < len(states) else mode:
                logits.append(decoder.leaving(found))
        return logits
