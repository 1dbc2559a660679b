"""What a decoder remembers between calls: packed buffers that become Core ML states.

    states = make_states(spec, context, spare)         # {"cache": KVCache(...)}
    for state in state_specs(spec, context, spare): ...  # cache_keys, cache_values, their shapes

Each kind of state is a class here: its buffers, what a pass sees of them, and the custom op that
writes them. For every such op there is a Core ML lowering (`lower/coreml_ops.py`) and a form in
ATen ops (`lower/xnnpack.py`). There is one kind: keys and values. Layers of the same sizes share a
buffer for keys and one for values, `[layers, kv_heads, context + spare, head_dim]`: programs with
more than two states have been reported to compile and then fail on device. The spare positions take
what a padded chunk writes beyond the context; nothing reads them. In an exported graph a write is
the op `llm_coreml::kv_write`, which the Core ML lowering turns into `read_state -> slice_update ->
write_state`, in place; eagerly it is a plain slice assignment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef

from llm_coreml.decoder.spec import CacheSizes, DecoderSpec


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a program remembers between calls.

    Attributes:
        name: As programs call it: `cache_keys`.
        shape: Its sizes.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """Where a layer's part of the states lies.

    Attributes:
        state: The state's name in the decoder.
        row: Which row of its buffers.
    """

    state: str
    row: int


class View:
    """What the layers see of a state, and write to it, during one pass."""


class State(nn.Module, ABC):
    """What a decoder remembers of one sequence, of one kind; all buffers are fp32.

    A pass may end with pads, which repeat the last token at its position, see `Decoder.forward`:
    what it writes of them must not be seen by any later pass.

    Attributes:
        write: The custom op that an exported graph writes it with.
    """

    write: ClassVar[CustomOpDef]

    @abstractmethod
    def open(self) -> View:
        """Return the view that one pass reads and updates."""

    @abstractmethod
    def close(self, view: View) -> None:
        """Keep what a pass wrote to the view that `open` gave."""

    @abstractmethod
    def window(self) -> View:
        """Return the view of a pass over all tokens that there are: nothing before, none kept."""

    def reset(self) -> None:
        """Forget the sequence: every entry becomes zero."""
        for buffer in self.buffers():
            buffer.zero_()


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


class CacheView(View):
    """The cache during one forward pass.

    Eagerly it writes into the buffers. In an exported graph it carries the updated tensors from
    layer to layer, so that each write is one op on the value before it, and no copy in between.

    Args:
        keys: The state's keys.
        values: Its values.
        context: How many of their positions are read.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, context: int) -> None:
        self.keys = keys
        self.values = values
        self.context = context

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, start_pos: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new `[1, kv_heads, S, head_dim]` entries and return the layer's whole cache.

        Returns:
            Keys and values of all positions, each `[1, kv_heads, context, head_dim]`; positions
            not written yet are zero and must be masked.
        """
        if torch.compiler.is_exporting():
            self.keys = kv_write(self.keys, keys, layer, start_pos)
            self.values = kv_write(self.values, values, layer, start_pos)
        else:
            span = slice(int(start_pos), int(start_pos) + keys.shape[2])
            self.keys[layer, :, span] = keys[0]
            self.values[layer, :, span] = values[0]
        return self.shared(layer, keys, values)

    def shared(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `update` gave for a layer, to one that attends to the same.

        Args:
            layer: Row of the cache.
            keys: The new ones, as `update` was given them.
            values: The same of values.
        """
        return self._read(self.keys, layer), self._read(self.values, layer)

    def _read(self, cache: torch.Tensor, layer: int) -> torch.Tensor:
        """Return a layer's rows of all positions of the context."""
        rows = cache[layer : layer + 1]
        return rows if cache.shape[2] == self.context else rows[:, :, : self.context]


class _WindowView(CacheView):
    """No cache: what is attended to is what was just computed."""

    def __init__(self) -> None:
        """Hold nothing."""

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, start_pos: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as they are."""
        return keys, values

    def shared(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as they are."""
        return keys, values


class KVCache(State):
    """Keys and values of several layers for one sequence.

    Args:
        num_layers: Layers of these sizes.
        num_key_value_heads: Key/value heads of one layer.
        context: Positions that are read.
        head_dim: Width of one head.
        spare: Positions behind them, which pads are written to.
    """

    write = kv_write
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        context: int,
        head_dim: int,
        spare: int = 0,
    ) -> None:
        super().__init__()
        self.context = context
        shape = (num_layers, num_key_value_heads, context + spare, head_dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)

    def open(self) -> CacheView:
        """Return the view that one forward pass reads and updates."""
        return CacheView(self.keys, self.values, self.context)

    def close(self, view: View) -> None:
        """Keep what the pass wrote; eagerly it is in the buffers already."""
        assert isinstance(view, CacheView)
        if torch.compiler.is_exporting():
            self.keys.copy_(view.keys)
            self.values.copy_(view.values)

    def window(self) -> CacheView:
        """Return a view that hands keys and values on, and holds nothing."""
        return _WindowView()


def slots(spec: DecoderSpec) -> tuple[Slot, ...]:
    """Return where the part of every layer lies, or of the one whose keys and values it shares."""
    found = {}
    for number, layers in enumerate(_caches(spec).values()):
        for row, owner in enumerate(layers):
            found[owner] = Slot(numbered("cache", number), row)
    for index, layer in enumerate(spec.layers):
        if layer.mixer.shares is not None:
            found[index] = found[layer.mixer.shares]
    return tuple(found[index] for index in range(len(spec.layers)))


def make_states(spec: DecoderSpec, context: int, spare: int = 0) -> dict[str, State]:
    """Return empty states for `context` positions, by their names in the decoder."""
    return {
        numbered("cache", number): KVCache(len(layers), sizes.heads, context, sizes.head_dim, spare)
        for number, (sizes, layers) in enumerate(_caches(spec).items())
    }


def state_specs(spec: DecoderSpec, context: int, spare: int = 0) -> tuple[StateSpec, ...]:
    """Return every tensor that programs of `context` positions remember."""
    with torch.device("meta"):
        states = make_states(spec, context, spare)
    return tuple(
        StateSpec(f"{name}_{part}", tuple(buffer.shape))
        for name, state in states.items()
        for part, buffer in state.named_buffers()
    )


def numbered(name: str, number: int) -> str:
    """Return the name of one of several, the first of which has no number."""
    return f"{name}_{number}" if number else name


def _caches(spec: DecoderSpec) -> dict[CacheSizes, list[int]]:
    """Return the layers whose caches have the same number of heads and head size."""
    found: dict[CacheSizes, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        if layer.mixer.remembers is not None:
            found.setdefault(layer.mixer.remembers, []).append(index)
    return found
