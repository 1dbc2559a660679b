"""The decoder: tokens and a position in, logits out, with the KV cache inside.

    decoder = Decoder(spec, context=512)     # sizes only: weights arrive one at a time
    logits = decoder(tokens, start_pos)      # int64 [1, S], int64 [1] -> float [1, 1, vocab]

The same module runs eagerly (the judge of every artifact) and is exported for Core ML.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder.block import Block
from llm_coreml.decoder.caches import held_positions
from llm_coreml.decoder.chosen_tokens import chosen
from llm_coreml.decoder.chunk import Chunk, make_mask
from llm_coreml.decoder.matrices import Embedding, Linear, PositionTable, SoftCap, beside, number
from llm_coreml.decoder.norm import norm_of
from llm_coreml.decoder.per_layer import PerLayerInputs
from llm_coreml.decoder.position_tables import (
    growth_names,
    position_tables,
    rotary_names,
    slope_names,
)
from llm_coreml.decoder.rope import both_halves
from llm_coreml.decoder.self_attention import AttentionForm
from llm_coreml.decoder.spec import DecoderSpec, Extent, MaskKey
from llm_coreml.decoder.state import Start, State, View
from llm_coreml.decoder.states import make_states, slots
from llm_coreml.decoder.wiring import Matrix, Wiring, joined, run
from llm_coreml.heads import LOGITS, Head
from llm_coreml.targets import Operations

# Takes the rows of tokens out of a table.
LookUp = Callable[[Embedding, torch.Tensor], torch.Tensor]
LogitsForm = Literal["last", "all"]


def skeleton(spec: DecoderSpec) -> Decoder:
    """Return a decoder with names, shapes and wiring alone, however large a file says that it is.

    Nothing in it has numbers: it cannot be run.
    """
    with torch.device("meta"):
        return Decoder(spec, context=1)


class Decoder(nn.Module):
    """A decoder-only transformer with a static graph and a fixed context.

    Args:
        spec: Sizes and options.
        context: Positions of a sequence.
        attention: `fused` or `decomposed`, see `Attention`.
        logits: `last` returns the last row of a chunk, `all` every row.
        spare: Positions that the states hold beyond the context, see `forward`.
        longest: The most tokens of a call in an exported graph; None is the whole context. By it
            the rings of layers with windows are sized; eagerly longer calls are read in parts.
        head: What `forward` and `carrying` give of each row of logits.
        multiple: What the widths of states are multiples of.
        operations: `fewest` makes heads of queries, keys and values together, see `Attention`.
    """

    positions: torch.Tensor
    embedding_multiplier: torch.Tensor | None
    logits_multiplier: torch.Tensor | None

    def __init__(
        self,
        spec: DecoderSpec,
        context: int,
        attention: AttentionForm = "fused",
        logits: LogitsForm = "last",
        spare: int = 0,
        longest: int | None = None,
        head: Head = LOGITS,
        multiple: int = 1,
        operations: Operations = "usual",
    ) -> None:
        super().__init__()
        self.spec, self.chosen, self.context = spec, head, context
        self.extent = Extent(context, spare, longest, multiple)
        self.attention, self.operations = attention, operations
        self.logits = logits
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size)
        if spec.learned_positions is not None:
            self.embed_positions = PositionTable(spec.learned_positions, spec.hidden_size)
        if spec.embedding_norm is not None:
            self.embed_norm = norm_of(spec.embedding_norm, spec.hidden_size)
        self.layers = nn.ModuleList(
            Block(spec, index, slot, attention, operations)
            for index, slot in enumerate(slots(spec, self.extent))
        )
        self.per_layer: PerLayerInputs | None = None
        if spec.per_layer is not None:
            self.per_layer = PerLayerInputs(spec.per_layer, spec.hidden_size, len(spec.layers))
        self.norm = norm_of(spec.norm, spec.hidden_size)
        self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=spec.head_bias)
        self.softcap = None if spec.logits_softcap is None else SoftCap(spec.logits_softcap)
        for name, state in make_states(spec, self.extent).items():
            self.add_module(name, state)
        for name, table in position_tables(spec, context).items():
            self.register_buffer(name, table, persistent=False)
        for name, held in (
            ("embedding_multiplier", number(spec.embedding_multiplier, 1.0)),
            ("logits_multiplier", number(spec.logits_multiplier, 1.0)),
        ):
            self.register_buffer(name, held, persistent=False)
        positions = torch.arange(context, dtype=torch.int32)
        self.register_buffer("positions", positions, persistent=False)
        for ring in self._rings():
            self.register_buffer(_places_in(ring), positions % ring, persistent=False)

    @property
    def states(self) -> dict[str, State]:
        """What is remembered between calls, by name."""
        return {name: part for name, part in self.named_children() if isinstance(part, State)}

    @property
    def tables(self) -> tuple[Embedding, ...]:
        """The tables of tokens, which `embed` reads."""
        if self.per_layer is None:
            return (self.embed_tokens,)
        return self.embed_tokens, self.per_layer.embed_tokens

    @functools.cached_property
    def wiring(self) -> Wiring:
        """What each matrix reads and writes, the token table's rows being what it writes."""
        parts = [Wiring(((Matrix("embed_tokens", writes="residual"),),))]
        if self.per_layer is not None:
            parts.append(self.per_layer.wiring.inside("per_layer"))
        parts += [
            self.block(index).wiring.inside(f"layers.{index}") for index in range(len(self.layers))
        ]
        head = Wiring(((Matrix("lm_head", reads="residual", norm="norm"),),))
        return joined(*parts, head)

    def block(self, index: int) -> Block:
        """Return one of the layers."""
        block = self.layers[index]
        assert isinstance(block, Block)
        return block

    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: torch.Tensor,
        last_pos: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run one chunk that continues the sequence at `start_pos`.

        A padded chunk repeats its last token. With `last_pos` the pads are read at that token's
        position, so that their rows equal its row, and the last row is always a real token's. What
        they write to the states lies behind it: no real row sees it, and the next chunk writes
        over it. Up to `spare` pads may lie beyond the context.

        Args:
            tokens: int `[1, S]`, 1 <= S, `start_pos` + S <= context + spare.
            start_pos: int `[1]`, how many positions of the states are filled.
            last_pos: int `[1]`, position of the last real token, below the context; None if there
                are no pads.

        Returns:
            float32 logits, `[1, 1, vocab]` (`last`) or `[1, S, vocab]` (`all`); of a head that
            gives K tokens, their logits and themselves, int32, `[1, 1 or S, K]` each.
        """
        x = self.blocks(self.embed(tokens, start_pos, last_pos), start_pos, last_pos)
        given = self.results(x[:, -1:] if self.logits == "last" else x)
        return given[0] if len(given) == 1 else given

    def carrying(
        self,
        tokens: torch.Tensor,
        start_pos: torch.Tensor,
        last_pos: torch.Tensor | None,
        caches: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Do what `forward` does with states that are given and returned, and keep nothing.

        Args:
            tokens: See `forward`.
            start_pos: See `forward`.
            last_pos: See `forward`.
            caches: Every buffer of `states`, in their order, of any float type; not changed.

        Returns:
            What `forward` gives, and what each of `caches` has become.
        """
        each = iter(caches)
        lent = {
            name: [next(each).to(torch.float32) for _ in state.buffers()]
            for name, state in self.states.items()
        }
        x = self.embed(tokens, start_pos, last_pos)
        chunk = self.chunk(x.shape[1], start_pos, last_pos, lent)
        x = self._through(x, chunk)
        given = self.results(x[:, -1:] if self.logits == "last" else x)
        returned = [
            buffer
            for name, state in self.states.items()
            for buffer in state.returned(chunk.views[name])
        ]
        return *given, *(
            buffer.to(cache.dtype) for buffer, cache in zip(returned, caches, strict=True)
        )

    def hidden(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does up to the head, for every row: float32 `[1, S, hidden]`."""
        return self.blocks(self.embed(tokens, start_pos), start_pos)

    def embed(
        self,
        tokens: torch.Tensor,
        start_pos: torch.Tensor | None = None,
        last_pos: torch.Tensor | None = None,
        look_up: LookUp = Embedding.__call__,
    ) -> torch.Tensor:
        """Return what the first block gets for int `tokens` `[1, S]`.

        Args:
            tokens: What is read.
            start_pos: See `forward`; None is the first position.
            last_pos: See `forward`.
            look_up: Takes rows `[1, S, columns]` out of a table.

        Returns:
            float32 `[1, S, hidden]`; where blocks are given more, as `Layout` has it.
        """
        tokens = tokens.to(torch.int32)
        x = look_up(self.embed_tokens, tokens)
        x = x if self.embedding_multiplier is None else x * self.embedding_multiplier
        if self.spec.learned_positions is not None:
            first = self.positions[:1] if start_pos is None else start_pos.to(torch.int32)
            x = x + self.embed_positions(self._positions(x.shape[-2], first, last_pos))
        x = x if self.spec.embedding_norm is None else self.embed_norm(x)
        if self.per_layer is None:
            return x
        rows = look_up(self.per_layer.embed_tokens, tokens)
        return torch.cat((x, self.per_layer(x, rows)), dim=-1)

    def blocks(
        self, x: torch.Tensor, start_pos: torch.Tensor, last_pos: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Do what `hidden` does, for tokens of which the first block gets `x` `[1, S, hidden]`."""
        longest = self.extent.longest
        if longest and not torch.compiler.is_exporting() and x.shape[1] > longest:
            parts = enumerate(torch.split(x, longest, dim=1))
            return torch.cat(
                [self.blocks(part, start_pos + n * longest, last_pos) for n, part in parts], 1
            )
        chunk = self.chunk(x.shape[1], start_pos, last_pos)
        x = self._through(x, chunk)
        for name, state in self.states.items():
            state.close(chunk.views[name])
        return x

    def chunk(
        self,
        length: int,
        start_pos: torch.Tensor,
        last_pos: torch.Tensor | None = None,
        lent: Mapping[str, Sequence[torch.Tensor]] | None = None,
    ) -> Chunk:
        """Return what every block is told of `length` tokens from `start_pos` int `[1]` on.

        Args:
            length: How many tokens there are.
            start_pos: Position of the first.
            last_pos: See `forward`.
            lent: Buffers of the states by name, to be used in their place, see `State.lend`.
        """
        start_pos = start_pos.to(torch.int32)
        rows = self._positions(length, start_pos, last_pos)
        starts = self.starts(length, start_pos)
        columns: dict[int | None, torch.Tensor] = {None: self.positions}
        for ring in self._rings():
            columns[ring] = held_positions(
                self.positions[:ring], starts[ring].place, start_pos, length, self.extent
            )
        views = {
            name: state.open(starts[state.ring])
            if lent is None
            else state.lend(starts[state.ring], lent[name])
            for name, state in self.states.items()
        }
        return self._chunk(rows, columns, views)

    def starts(self, length: int, start_pos: torch.Tensor) -> dict[int | None, Start]:
        """Return where `length` tokens from `start_pos` int32 `[1]` on go, by rings' sizes."""
        places: dict[int | None, torch.Tensor] = {None: start_pos}
        for ring in self._rings():
            # Looked up, as positions are: no division need be exact on a device.
            places[ring] = self.get_buffer(_places_in(ring)).index_select(0, start_pos)
        return {ring: Start(place, length) for ring, place in places.items()}

    def window(self, length: int) -> Chunk:
        """Return what every block is told of `length` tokens that are all there is.

        No state is read or written.
        """
        rows = self.positions[:length]
        views = {name: state.window() for name, state in self.states.items()}
        return self._chunk(rows, {None: rows}, views)

    def reading(self, length: int, start: int, views: Mapping[str, View]) -> Chunk:
        """Return what every block is told of `length` tokens from position `start` on.

        The views of the states hold what came before, and nothing else.
        """
        rows = self.positions[start : start + length]
        return self._chunk(rows, {None: self.positions[: start + length]}, views)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of rows that `hidden` gave, `[..., hidden]` -> `[..., vocab]`."""
        return self._capped(self.lm_head(self.norm(x)))

    def leaving(self, products: torch.Tensor) -> torch.Tensor:
        """Return the logits that products with the head's matrix `[..., vocab]` become."""
        bias = self.lm_head.bias
        return self._capped(products if bias is None else products + beside(bias, products))

    def reset(self) -> None:
        """Forget the sequence."""
        for state in self.states.values():
            state.reset()

    def results(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what a call gives, of the rows that the head reads, `[1, rows, hidden]`."""
        return chosen(self.head(x), self.chosen)

    def _through(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Take `x`, as `embed` gives it, through all blocks: `[1, S, hidden]`."""
        carried = self.block(0).entering.taken_apart(x)
        for index in range(len(self.layers)):
            carried = run(self.block(index).through(carried, chunk))
        return carried.stream

    def _capped(self, products: torch.Tensor) -> torch.Tensor:
        multiplier = self.logits_multiplier
        logits = products if multiplier is None else products * beside(multiplier, products)
        return logits if self.softcap is None else self.softcap(logits)

    def _positions(
        self, length: int, start_pos: torch.Tensor, last_pos: torch.Tensor | None
    ) -> torch.Tensor:
        """Return where the tokens of a call are read, int32 `[S]`; pads where the last one is."""
        rows = self.positions[:length] + start_pos
        return rows if last_pos is None else torch.minimum(rows, last_pos.to(torch.int32))

    def _chunk(
        self,
        rows: torch.Tensor,
        columns: Mapping[int | None, torch.Tensor],
        views: Mapping[str, View],
    ) -> Chunk:
        """Return a chunk of tokens at `rows`, which attend to `columns`, those of a ring by it."""
        rotary = tuple(
            (self._rows_of(cos, rows), self._rows_of(sin, rows))
            for cos, sin in rotary_names(self.spec)
        )
        growths = {
            growth: self._rows_of(name, rows)
            for growth, name in growth_names(self.spec, self.context).items()
        }
        slopes = {key: self.get_buffer(name) for key, name in slope_names(self.spec).items()}
        masks: dict[MaskKey, torch.Tensor] = {}
        for layer in self.spec.layers:
            ring = layer.mixer.remembers.ring(self.extent)
            for key in layer.mixer.masks:
                if key not in masks:
                    seen = columns.get(ring, columns[None])
                    masks[key] = make_mask(key, rows, seen, slopes.get(key[2]))
        zeros = None
        if any(layer.mixer.sinks for layer in self.spec.layers):
            # As many as rows, without a length that a lowering would have to compute.
            zeros = (rows * 0).to(torch.float32).unsqueeze(1)
        turned = rotary if self.operations == "fewest" else ()
        turns = tuple(both_halves(cos.squeeze(1), sin.squeeze(1)) for cos, sin in turned)
        return Chunk(rotary, turns, masks, growths, zeros, views)

    def _rings(self) -> list[int]:
        """Return the sizes of all rings."""
        found = (layer.mixer.remembers.ring(self.extent) for layer in self.spec.layers)
        return sorted({ring for ring in found if ring is not None})

    def _rows_of(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return what a table `[context, width]` holds of positions `[S]`: `[S, 1, width]`."""
        return F.embedding(rows, self.get_buffer(name)).unsqueeze(1)


def _places_in(ring: int) -> str:
    """Return what the table is called that tells where a ring holds each position."""
    return f"places_{ring}"
