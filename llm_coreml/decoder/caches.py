"""Keys and values of the positions before: of all of them, or of the last ones in a ring.

    cache = KVCache(num_layers, CacheSizes(2, 64), extent)
    view = cache.open(Start(place, length=8))
    keys, values = view.update(row, keys, values)     # what a layer attends to
    cache.close(view)

Layers of the same sizes share their buffers, `[layers, kv_heads, positions, head_dim]`; or one
buffer, `[layers, 2 * kv_heads, positions, head_dim]`, where a program would have too many. A pass
writes first, and then attends to what lies there. In an exported graph a write is an op on the
value before it, which the Core ML lowering turns into `read_state -> slice_update -> write_state`,
in place; eagerly it is an assignment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F

from llm_coreml.decoder.spec import CacheSizes, Extent
from llm_coreml.decoder.state import Start, State, View


@torch.library.custom_op("llm_coreml::kv_write", mutates_args=())
def kv_write(
    cache: torch.Tensor, update: torch.Tensor, layer: int, start_pos: torch.Tensor
) -> torch.Tensor:
    """Return `cache` with `update` stored at `[layer, :, start_pos : start_pos + S, :]`.

    Args:
        cache: `[layers, kv_heads, context + spare, head_dim]`.
        update: New keys or values, `[1, kv_heads, S, head_dim]`.
        layer: Row of the cache that belongs to the calling layer.
        start_pos: int `[1]`, position of the first new token.
    """
    first = int(start_pos)
    result = cache.clone()
    result[layer, :, first : first + update.shape[2]] = update[0].to(cache.dtype)
    return result


@kv_write.register_fake
def _(
    cache: torch.Tensor, update: torch.Tensor, layer: int, start_pos: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("llm_coreml::ring_write", mutates_args=())
def ring_write(
    cache: torch.Tensor, update: torch.Tensor, layer: int, place: torch.Tensor, length: int
) -> torch.Tensor:
    """Return `cache` with `update` stored at `place` and after it, and from 0 on past the end.

    Args:
        cache: `[layers, kv_heads, positions, head_dim]`.
        update: New keys or values, `[1, kv_heads, S, head_dim]`, 2 * S <= positions.
        layer: Row of the cache that belongs to the calling layer.
        place: int `[1]`, where the first new token goes, below positions.
        length: S, of the chunk: what follows from it need be computed once for all layers.
    """
    result = cache.clone()
    result[layer, :, ring_places(place, length, cache.shape[2])] = update[0].to(cache.dtype)
    return result


@ring_write.register_fake
def _(
    cache: torch.Tensor, update: torch.Tensor, layer: int, place: torch.Tensor, length: int
) -> torch.Tensor:
    return torch.empty_like(cache)


def ring_places(place: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Return where a ring of `size` holds `length` tokens, the first at `place`: int64."""
    return (place.to(torch.int64) + torch.arange(length, device=place.device)) % size


class CacheView(View, ABC):
    """Keys and values during one forward pass."""

    @abstractmethod
    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new `[1, kv_heads, S, head_dim]` entries and return what the layer attends to.

        Returns:
            Keys and values, each `[1, kv_heads, positions, head_dim]`. Which position lies where,
            and that others are not seen, is for masks to tell; what was never written is zero.
        """

    @abstractmethod
    def shared(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `update` gave for a layer, to one that attends to the same.

        Args:
            layer: Row of the cache.
            keys: The new ones, as `update` was given them.
            values: The same of values.
        """


@final
class _Open(CacheView):
    """A cache that is read and updated.

    Eagerly it writes into the buffers. In an exported graph it carries the updated tensors from
    layer to layer, so that each write is one op on the value before it, and no copy in between.

    Attributes:
        buffers: Keys and values, or one that holds both.
    """

    def __init__(self, cache: Cache, start: Start) -> None:
        self.buffers = list(cache.buffers())
        self._cache = cache
        self._start = start

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store and return, see `CacheView`."""
        for number, entries in enumerate(self._cache.packed(keys, values)):
            if torch.compiler.is_exporting():
                buffer = self.buffers[number]
                self.buffers[number] = self._cache.written(buffer, entries, layer, self._start)
            else:
                self._cache.put(self.buffers[number][layer], entries[0], self._start)
        return self.shared(layer, keys, values)

    def shared(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what lies there, see `CacheView`."""
        return self._cache.parted([self._read(buffer, layer) for buffer in self.buffers])

    def _read(self, buffer: torch.Tensor, layer: int) -> torch.Tensor:
        """Return a layer's rows of all positions that are read."""
        rows = buffer[layer : layer + 1]
        read = self._cache.read
        return rows if buffer.shape[2] == read else rows[:, :, :read]


@final
class _Lent(CacheView):
    """A cache that a pass is given, and gives back; nothing is kept.

    Each layer has rows of its own, so that a write is one op on these alone.
    """

    def __init__(self, cache: Cache, start: Start, buffers: Sequence[torch.Tensor]) -> None:
        self._rows = [[buffer[at : at + 1] for at in range(len(buffer))] for buffer in buffers]
        self._cache = cache
        self._start = start

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What the buffers have become."""
        return [torch.cat(rows) for rows in self._rows]

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store and return, see `CacheView`."""
        for rows, entries in zip(self._rows, self._cache.packed(keys, values), strict=True):
            rows[layer] = self._cache.written(rows[layer], entries, 0, self._start)
        return self.shared(layer, keys, values)

    def shared(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what lies there, see `CacheView`."""
        read = self._cache.read
        found = [rows[layer] for rows in self._rows]
        return self._cache.parted(
            [own if own.shape[2] == read else own[:, :, :read] for own in found]
        )


@final
class _Handed(CacheView):
    """No cache: what is attended to is what was just computed."""

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as they are."""
        return keys, values

    def shared(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as they are."""
        return keys, values


@final
class Shifted(CacheView):
    """The view of a cache that holds the rows of later layers alone.

    Args:
        view: Of that cache.
        first: Which row of all layers its own first one is.
    """

    def __init__(self, view: CacheView, first: int) -> None:
        self.view = view
        self._first = first

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store and return, see `CacheView`."""
        return self.view.update(layer - self._first, keys, values)

    def shared(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what lies there, see `CacheView`."""
        return self.view.shared(layer - self._first, keys, values)


class Cache(State):
    """Keys and values of several layers for one sequence.

    Args:
        num_layers: Layers of these sizes.
        sizes: Their sizes.
        extent: What they are to hold.
        joint: Keys and values lie in one buffer, the heads of the keys first.

    Attributes:
        heads: Key/value heads of one layer.
        head_dim: Width of one head; behind it a buffer may have zeros.
        read: How many positions attention reads, the first ones.
    """

    def __init__(
        self, num_layers: int, sizes: CacheSizes, extent: Extent, *, joint: bool = False
    ) -> None:
        super().__init__()
        self.ring = sizes.ring(extent)
        self.read = self.ring or extent.context
        self.heads, self.head_dim = sizes.heads, sizes.head_dim
        self._zeros = -sizes.head_dim % extent.multiple
        heads = 2 * sizes.heads if joint else sizes.heads
        for name in ("kv",) if joint else ("keys", "values"):
            shape = (num_layers, heads, sizes.positions(extent), sizes.head_dim + self._zeros)
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    @abstractmethod
    def written(
        self, buffer: torch.Tensor, entries: torch.Tensor, layer: int, start: Start
    ) -> torch.Tensor:
        """Return a buffer with entries `[1, heads, S, head_dim]` of a layer, by the op `write`."""

    @abstractmethod
    def put(self, rows: torch.Tensor, entries: torch.Tensor, start: Start) -> None:
        """Store entries in place.

        Args:
            rows: A layer's part of a buffer, `[heads, positions, head_dim]`.
            entries: `[heads, S, head_dim]`.
            start: Of the pass.
        """

    @abstractmethod
    def kept(self, start: int) -> tuple[slice, torch.Tensor]:
        """Return which positions before `start` it holds, and where, int64."""

    def packed(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return entries `[1, kv_heads, S, head_dim]` as each buffer has them."""
        if self._zeros:
            keys, values = (F.pad(part, (0, self._zeros)) for part in (keys, values))
        joint = len(list(self.buffers())) == 1
        return (torch.cat((keys, values), 1),) if joint else (keys, values)

    def parted(self, found: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values in what is read of each buffer, `[1, heads, S, head_dim]`."""
        if self._zeros:
            found = [part[..., : self.head_dim] for part in found]
        if len(found) == 1:
            return found[0][:, : self.heads], found[0][:, self.heads :]
        keys, values = found
        return keys, values

    def open(self, start: Start) -> CacheView:
        """Return the view that one forward pass reads and updates."""
        return _Open(self, start)

    def close(self, view: View) -> None:
        """Keep what the pass wrote; eagerly it is in the buffers already."""
        assert isinstance(view, _Open)
        if torch.compiler.is_exporting():
            for buffer, written in zip(self.buffers(), view.buffers, strict=True):
                buffer.copy_(written)

    def lend(self, start: Start, buffers: Sequence[torch.Tensor]) -> CacheView:
        """Return the view of a pass that is given the buffers, see `State.lend`."""
        return _Lent(self, start, buffers)

    def returned(self, view: View) -> Sequence[torch.Tensor]:
        """Return what the buffers have become."""
        assert isinstance(view, _Lent)
        return view.buffers

    def window(self) -> CacheView:
        """Return a view that hands keys and values on, and holds nothing."""
        return _Handed()


@final
class KVCache(Cache):
    """Keys and values of every position.

    The spare positions take what a padded chunk writes beyond the context; nothing reads them.
    """

    write = kv_write

    def written(
        self, buffer: torch.Tensor, entries: torch.Tensor, layer: int, start: Start
    ) -> torch.Tensor:
        """Return the buffer with entries at their positions."""
        result: torch.Tensor = kv_write(buffer, entries, layer, start.place)
        return result

    def put(self, rows: torch.Tensor, entries: torch.Tensor, start: Start) -> None:
        """Store entries at their positions."""
        first = int(start.place)
        rows[:, first : first + entries.shape[1]] = entries

    def kept(self, start: int) -> tuple[slice, torch.Tensor]:
        """Return all positions, each at its own place."""
        return slice(0, start), torch.arange(start)


@final
class RingCache(Cache):
    """Keys and values of the last positions, of layers whose window is shorter than the context.

    Position p lies at place p % ring. The ring is so large that no token of a pass, nor a pad, is
    written over what another token of the pass or of a later one sees, see `CacheSizes.ring`.
    """

    write = ring_write

    def written(
        self, buffer: torch.Tensor, entries: torch.Tensor, layer: int, start: Start
    ) -> torch.Tensor:
        """Return the buffer with entries from their place on, past the end at the beginning."""
        result: torch.Tensor = ring_write(buffer, entries, layer, start.place, start.length)
        return result

    def put(self, rows: torch.Tensor, entries: torch.Tensor, start: Start) -> None:
        """Store entries from their place on, past the end at the beginning."""
        rows[:, ring_places(start.place, start.length, rows.shape[1])] = entries

    def kept(self, start: int) -> tuple[slice, torch.Tensor]:
        """Return the last positions."""
        assert self.ring is not None
        first = max(0, start - self.ring)
        return slice(first, start), torch.arange(first, start) % self.ring


def held_positions(
    places: torch.Tensor, place: torch.Tensor, start_pos: torch.Tensor, length: int, extent: Extent
) -> torch.Tensor:
    """Return which position each place of a ring holds once a chunk is written to it.

    Args:
        places: int32 `[ring]`, 0 and up.
        place: int32 `[1]`, where the chunk's first token is.
        start_pos: int32 `[1]`, its position.
        length: Tokens of the chunk.
        extent: Of the decoder.

    Returns:
        int32 `[ring]`; of places that were never written a position beyond all others.
    """
    size = len(places)
    end = place + (length - 1)
    # Places behind the chunk's end hold what is a turn older, those past the ring's end wrapped.
    turns = (places <= end - size).to(torch.int32) - (places > end).to(torch.int32)
    held = places + (start_pos - place) + turns * size
    return held + (held < 0).to(torch.int32) * (2 * size + extent.context + extent.spare)
