"""What a cache holds of a text, layer by layer, while a decoder reads it block by block.

    text = CachedText(decoder, half=False)               # read from position 0
    later = CachedText(decoder, before=LaterCache(decoder, text, start))
    decoder.told(rows, columns, later.views)

A cache before a late position must be one that use produces: of zeros, to which all attention goes,
no model has ever seen any. So it holds the keys and values of the text that was read from position
0; where that is shorter, it stands there again and again, its keys turned to where they stand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.caches import Cache, CacheView
from llm_coreml.decoder.position_tables import rotary_names
from llm_coreml.decoder.rope import rotate

Entries = tuple[torch.Tensor, torch.Tensor]


class LaterCache:
    """Caches whose first positions are filled with a text.

    Args:
        decoder: Tells of what sizes they are.
        text: What is read from position 0; its block is always computed first. None leaves zeros.
        start: How many positions are filled.

    Attributes:
        states: What programs call each tensor -> its content, fp16, as programs remember it:
            see `caches`. It grows with every block.
    """

    def __init__(self, decoder: Decoder, text: CachedText | None, start: int) -> None:
        self.start = start
        self._decoder = decoder
        self._text = text
        self._row: dict[str, int] = {}
        self._entries: dict[str, Entries] = {}
        self.states = {
            f"{name}_{part}": torch.zeros(buffer.shape, dtype=torch.float16)
            for name, state in decoder.states.items()
            for part, buffer in state.named_buffers()
        }

    def entries(self, name: str, row: int) -> Entries:
        """Return keys and values of a layer, fp32 `[1, kv_heads, start, head_dim]` each.

        They are rounded to fp16. Those that a ring has lost are there too, for masks to hide.
        """
        # Once: what a layer is given in fp32, and in plain fp16 after it, is the same.
        if self._row.get(name) != row:
            self._row[name] = row
            self._entries[name] = self._filled(name, row)
        keys, values = self._entries[name]
        return keys.to(torch.float32), values.to(torch.float32)

    def _filled(self, name: str, row: int) -> Entries:
        """Return what `entries` does, fp16, and have the states hold of it what they can."""
        state = self._decoder.states[name]
        assert isinstance(state, Cache)
        if self._text is None:
            shape = (1, state.heads, self.start, state.head_dim)
            return torch.zeros(shape, dtype=torch.float16), torch.zeros(shape, dtype=torch.float16)
        read = self._text.views[name].entries
        keys = self._repeated(read[0], self._rope_of(name, row)).to(torch.float16)
        values = self._repeated(read[1], None).to(torch.float16)
        positions, places = state.kept(self.start)
        parts = state.packed(keys[:, :, positions], values[:, :, positions])
        for (part, _), entries in zip(state.named_buffers(), parts, strict=True):
            self.states[f"{name}_{part}"][row][:, places] = entries[0]
        return keys, values

    def _repeated(self, entries: torch.Tensor, rope: _Turn | None) -> torch.Tensor:
        """Return `[1, kv_heads, start, head_dim]`: what was read, as often as it takes."""
        count, parts = entries.shape[2], []
        for first in range(0, self.start, count):
            part = entries[:, :, : self.start - first]
            parts.append(part if rope is None or not first else rope.further(part, first))
        return torch.cat(parts, 2)

    def _rope_of(self, name: str, row: int) -> _Turn | None:
        """Return what turns the keys of a layer, told by where its part of a cache lies."""
        decoder = self._decoder
        for index, layer in enumerate(decoder.spec.layers):
            attention, rope = decoder.block(index).self_attn, layer.mixer.rope
            if (attention.slot.state, attention.slot.row) == (name, row):
                if rope is None:
                    return None
                tables = (decoder.get_buffer(table) for table in rotary_names(decoder.spec)[rope])
                cos, sin = (table / decoder.spec.rotary[rope].attention_factor for table in tables)
                late = layer.mixer.qk_norm is not None and layer.mixer.qk_norm.rotated
                return _Turn(cos, sin, attention.k_norm.weight if late else None)
        raise AssertionError(f"no layer owns row {row} of {name}")


@dataclass(frozen=True)
class _Turn:
    """How keys are turned: cosines and sines of all positions, and a gain that comes after."""

    cos: torch.Tensor
    sin: torch.Tensor
    gain: torch.Tensor | None

    def further(self, keys: torch.Tensor, positions: int) -> torch.Tensor:
        """Return keys as they are so many positions later; angles grow evenly with positions."""
        if self.gain is None:
            return rotate(keys, self.cos[positions, None], self.sin[positions, None])
        # A norm is what it was, however its row is turned. Where the gain is zero, so are keys.
        bare = torch.where(self.gain == 0, 0.0, keys / self.gain)
        return self.gain * rotate(bare, self.cos[positions, None], self.sin[positions, None])


class _GrowingView(CacheView):
    """A layer's keys and values so far; the block after it begins anew.

    Args:
        name: Of the state.
        before: What it holds before the text.
        kept: Rows that later layers attend to.
    """

    def __init__(self, name: str, before: LaterCache | None, kept: Collection[int]) -> None:
        self._name = name
        self._before = before
        self._row: int | None = None
        self._kept: dict[int, Entries | None] = dict.fromkeys(kept)
        self.entries: Entries = (torch.empty(0), torch.empty(0))

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Entries:
        """Append `[1, kv_heads, S, head_dim]` and return all that there is of the layer."""
        if layer != self._row:
            self._row = layer
            past = None if self._before is None else self._before.entries(self._name, layer)
        else:
            past = self.entries
        if past is not None:
            keys, values = torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)
        self.entries = keys, values
        if layer in self._kept:
            self._kept[layer] = self.entries
        return self.entries

    def shared(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Entries:
        """Return all that there is of a layer, of later parts of the text, too."""
        found = self._kept[layer]
        assert found is not None
        return found


class CachedText:
    """A text that is being read.

    Args:
        decoder: What reads it, block by block.
        before: What the caches hold before its first token; None if that is at position 0.
    """

    def __init__(self, decoder: Decoder, before: LaterCache | None = None) -> None:
        slots = [decoder.block(index).self_attn.slot for index in decoder.spec.shared]
        self.views: Mapping[str, _GrowingView] = {
            name: _GrowingView(name, before, {slot.row for slot in slots if slot.state == name})
            for name in decoder.states
        }
