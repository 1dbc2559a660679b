"""A decoder cut into parts, each a program of its own: some layers, and what is beside them.

    shares = (Share(range(0, 2), embedding=True), Share(range(2, 4)), Share(head=True))
    x = Part(decoder, shares[0])(tokens=tokens, start_pos=start_pos)[0]
    x = Part(decoder, shares[1])(hidden=x, start_pos=start_pos)[0]
    logits = Part(decoder, shares[2])(hidden=x[:, -1:])[0]

The parts in a row are the same operations on the same weights; what goes from one to the next is
what goes from block to block, see `carried.Layout`. A part remembers the rows of its own layers.
Positions, masks and rows of rotary tables follow from `start_pos`, and each part has its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call

from llm_coreml.decoder.block import Block
from llm_coreml.decoder.caches import Cache, Shifted
from llm_coreml.decoder.carried import Layout
from llm_coreml.decoder.decoder import Decoder
from llm_coreml.decoder.spec import DecoderSpec
from llm_coreml.decoder.states import make_states, part_rows
from llm_coreml.decoder.wiring import run

# Modules of a decoder that stand before its layers, and behind them.
_BEFORE = ("embed_tokens", "embed_positions", "embed_norm", "per_layer")
_BEHIND = ("norm", "lm_head", "softcap")


@dataclass(frozen=True)
class Share:
    """What a part has of a decoder.

    Attributes:
        layers: Consecutive ones.
        embedding: It takes tokens.
        head: It gives logits.
        table_outside: The token table lies elsewhere: it is given rows of that, and no tokens.
        head_outside: The head's matrix lies elsewhere: it gives what that is multiplied with, and
            no logits.
    """

    layers: range = range(0)
    embedding: bool = False
    head: bool = False
    table_outside: bool = False
    head_outside: bool = False

    @property
    def told(self) -> str:
        """What it has, in words."""
        first, last = self.layers.start, self.layers.stop - 1
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        parts = (
            "token table" if self.takes_tokens else "",
            layers if self.layers else "",
            "head" if self.gives_results else "",
        )
        return ", ".join(part for part in parts if part)

    @property
    def takes_tokens(self) -> bool:
        """Whether it begins with the token table."""
        return self.embedding and not self.table_outside

    @property
    def gives_results(self) -> bool:
        """Whether it ends with the head's matrix."""
        return self.head and not self.head_outside

    def ends(self, spec: DecoderSpec) -> bool:
        """Return whether it has the last layer."""
        return bool(self.layers) and self.layers.stop == len(spec.layers)

    def takes_positions(self, spec: DecoderSpec) -> bool:
        """Return whether anything in it goes by where a token stands."""
        learned = self.embedding and spec.learned_positions is not None
        return bool(self.layers) or learned

    def takes_rows(self, every_row: bool) -> bool:
        """Return whether it is given a row for each token, and not the last one alone."""
        return every_row or self.embedding or bool(self.layers)

    def gives_rows(self, spec: DecoderSpec, every_row: bool) -> bool:
        """Return whether it gives a row for each token."""
        return every_row or not (self.head or self.ends(spec))

    def entering(self, spec: DecoderSpec) -> int:
        """Return the width of what it takes, which it does not if it takes tokens."""
        return _width(spec, self.layers.start if self.layers else len(spec.layers))

    def leaving(self, spec: DecoderSpec) -> int:
        """Return the width of what it gives, which it does not if it gives logits."""
        return _width(spec, self.layers.stop)


def _width(spec: DecoderSpec, index: int) -> int:
    """Return the width of what enters a layer, or leaves the last."""
    layout = Layout.of(spec, index)
    heads = sum(2 * size.heads * size.head_dim for size in layout.heads.values())
    return layout.hidden + sum(layout.parts) + heads


class Part(nn.Module):
    """A part of a decoder, which holds its share of the modules and nothing else.

    Args:
        decoder: Whose weights and states it uses.
        share: What it has.
        border: The type of what it gives to the next part.
    """

    def __init__(self, decoder: Decoder, share: Share, border: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.share = share
        self.border = border
        self.decoder = _beside_layers(decoder, share)
        self.layers = nn.ModuleDict({str(index): decoder.layers[index] for index in share.layers})
        with torch.device("meta"):
            states = make_states(decoder.spec, decoder.extent, share.layers)
        rows = part_rows(decoder.spec, decoder.extent, share.layers)
        # By the state of the decoder: what it is called here, and the row that is its first one.
        self._own = {
            whole: (name, rows[whole].start) for name, whole in zip(states, rows, strict=True)
        }
        for (name, state), (whole, own) in zip(states.items(), rows.items(), strict=True):
            for part, buffer in decoder.states[whole].named_buffers():
                state.register_buffer(part, buffer[own.start : own.stop], persistent=False)
            self.add_module(name, state)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter by the decoder's name of it; those that are one, by the first name."""
        return {_told(name): held for name, held in self.named_parameters()}

    def forward(
        self,
        tokens: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        past: Mapping[str, torch.Tensor] | None = None,
        start_pos: torch.Tensor | None = None,
        last_pos: torch.Tensor | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Do this part of what `Decoder.forward` does.

        Args:
            tokens: int `[1, S]`, of a part with the token table.
            hidden: What the part before gave, of any other, `[1, S, width]`; `[1, 1, width]` where
                the head is a part and gives the last row.
            past: Every buffer of its states, if they are lent, see `Decoder.carrying`.
            start_pos: See `Decoder.forward`; absent where nothing goes by it.
            last_pos: See `Decoder.forward`.
            weights: All of its `weights`, to be used in their place; they may be narrower.

        Returns:
            What the next part takes, of a part with the head what a call gives, or what `Products`
            takes; then what each of `past` has become.
        """
        if weights is not None:
            own = {
                name: weights[_told(name)].to(held.dtype) for name, held in self.named_parameters()
            }
            rest = (tokens, hidden, past, start_pos, last_pos)
            given: tuple[torch.Tensor, ...] = functional_call(self, own, rest)
            return given
        if hidden is None:
            assert tokens is not None
            x = self.decoder.embed(tokens, start_pos, last_pos)
        else:
            x = hidden.to(torch.float32)
            if self.share.embedding:
                rows = x
                # Whatever stands for the tokens: they have been looked up.
                x = self.decoder.embed(rows[:, :, 0], start_pos, last_pos, lambda *_: rows)
        returned: list[torch.Tensor] = []
        if self.layers:
            assert start_pos is not None
            x, returned = self._through(x, start_pos, last_pos, list((past or {}).values()))
        # What the last layer leaves is for the head, which gives the logits of one row, or of all.
        if self.share.ends(self.decoder.spec) and self.decoder.logits == "last":
            x = x[:, -1:]
        if self.share.gives_results:
            return *self.decoder.results(x), *returned
        x = self.decoder.norm(x) if self.share.head else x
        return x.to(self.border), *returned

    def _through(
        self,
        x: torch.Tensor,
        start_pos: torch.Tensor,
        last_pos: torch.Tensor | None,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Take `x` through the layers: what leaves them, and what `past` has become."""
        starts = self.decoder.starts(x.shape[1], start_pos.to(torch.int32))
        views, given = {}, iter(past)
        for whole, state in self._states().items():
            start = starts[state.ring]
            lent = [next(given).to(torch.float32) for _ in state.buffers()] if past else []
            views[whole] = state.lend(start, lent) if past else state.open(start)
        shifted = {whole: Shifted(view, self._own[whole][1]) for whole, view in views.items()}
        chunk = replace(self.decoder.chunk(x.shape[1], start_pos, last_pos), views=shifted)
        blocks = [block for block in self.layers.values() if isinstance(block, Block)]
        carried = blocks[0].entering.taken_apart(x)
        for block in blocks:
            carried = run(block.through(carried, chunk))
        x = blocks[-1].leaving.put_together(carried)
        if past:
            found = [
                buffer
                for whole, state in self._states().items()
                for buffer in state.returned(views[whole])
            ]
            return x, [new.to(old.dtype) for new, old in zip(found, past, strict=True)]
        for whole, state in self._states().items():
            state.close(views[whole])
        return x, []

    def _states(self) -> dict[str, Cache]:
        """Return its states by the decoder's names of them."""
        states = {whole: self.get_submodule(name) for whole, (name, _) in self._own.items()}
        return {whole: state for whole, state in states.items() if isinstance(state, Cache)}


def _told(parameter: str) -> str:
    """Return what the whole decoder calls a parameter of a part."""
    return parameter.removeprefix("decoder.")


def _beside_layers(decoder: Decoder, share: Share) -> Decoder:
    """Return a decoder of the same modules, but for layers, states and what the share lacks."""
    kept = (*(_BEFORE if share.embedding else ()), *(_BEHIND if share.head else ()))
    bare = copy.copy(decoder)
    bare._modules = {name: part for name, part in decoder._modules.items() if name in kept}
    if share.table_outside:
        bare._modules["embed_tokens"] = nn.Identity()
    if share.head_outside:
        del bare._modules["lm_head"]
    return bare
