"""What a decoder remembers between calls: packed buffers that become Core ML states.

    states = make_states(spec, extent)           # {"cache": KVCache(...), "ring": RingCache(...)}
    for state in state_specs(spec, extent): ...  # cache_kv, ring_kv, their shapes

Each kind of state is a class: its buffers, what a pass sees of them, and the custom op that writes
them. For every such op there is a Core ML lowering (`lower/coreml_ops.py`) and a form in ATen ops
(`lower/xnnpack.py`). There are two kinds, both of keys and values (`caches.py`): of all positions,
and of the last ones in a ring, for layers with a window. Programs with more than two states have
been reported to compile and then fail on device. Where all layers have the same sizes, the two are
keys and values; else each kind of layer has one buffer for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llm_coreml.decoder.caches import KVCache, RingCache
from llm_coreml.decoder.spec import CacheSizes, DecoderSpec, Extent
from llm_coreml.decoder.state import State


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


def slots(spec: DecoderSpec, extent: Extent) -> tuple[Slot, ...]:
    """Return where the part of every layer lies, or of the one whose keys and values it shares."""
    found = {}
    for name, _, layers in _caches(spec, extent):
        for row, owner in enumerate(layers):
            found[owner] = Slot(name, row)
    for index, layer in enumerate(spec.layers):
        if layer.mixer.shares is not None:
            found[index] = found[layer.mixer.shares]
    return tuple(found[index] for index in range(len(spec.layers)))


def make_states(spec: DecoderSpec, extent: Extent, within: range | None = None) -> dict[str, State]:
    """Return empty states by their names in the decoder.

    Args:
        spec: Of the decoder.
        extent: What they are to hold.
        within: The layers of a partition, which remembers their rows alone, see `rows_of`; its
            states are called after the first of them.
    """
    caches = list(_caches(spec, extent))
    states: dict[str, State] = {}
    for name, sizes, layers in caches:
        kind = KVCache if sizes.ring(extent) is None else RingCache
        count = len(layers) if within is None else len(rows_of(layers, within))
        if count:
            called = name if within is None else f"layers_{within.start}_{name}"
            states[called] = kind(count, sizes, extent, joint=len(caches) > 1)
    return states


def rows_of(layers: Sequence[int], within: range) -> range:
    """Return which rows of a state of `layers` belong to the layers `within`, in a row."""
    rows = [row for row, layer in enumerate(layers) if layer in within]
    return range(rows[0], rows[-1] + 1) if rows else range(0)


def part_rows(spec: DecoderSpec, extent: Extent, within: range) -> dict[str, range]:
    """Return which rows of each of the decoder's states the layers of a partition have."""
    found = {name: rows_of(layers, within) for name, _, layers in _caches(spec, extent)}
    return {name: rows for name, rows in found.items() if rows}


def state_specs(
    spec: DecoderSpec, extent: Extent, within: range | None = None
) -> tuple[StateSpec, ...]:
    """Return every tensor that programs remember; of a partition see `make_states`."""
    with torch.device("meta"):
        states = make_states(spec, extent, within)
    return tuple(
        StateSpec(f"{name}_{part}", tuple(buffer.shape))
        for name, state in states.items()
        for part, buffer in state.named_buffers()
    )


def numbered(name: str, number: int) -> str:
    """Return the name of one of several, the first of which has no number."""
    return f"{name}_{number}" if number else name


def _caches(spec: DecoderSpec, extent: Extent) -> Iterator[tuple[str, CacheSizes, list[int]]]:
    """Yield name, sizes and layers of each cache: layers whose parts are of the same shape."""
    found: dict[tuple[int, int, int | None], list[int]] = {}
    for index, layer in enumerate(spec.layers):
        if layer.mixer.shares is not None:
            continue
        sizes = layer.mixer.remembers
        key = (sizes.heads, sizes.head_dim, sizes.ring(extent))
        found.setdefault(key, []).append(index)
    count = {"cache": 0, "ring": 0}
    for (_, _, ring), layers in found.items():
        name = "cache" if ring is None else "ring"
        yield numbered(name, count[name]), spec.layers[layers[0]].mixer.remembers, layers
        count[name] += 1
