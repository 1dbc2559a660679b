"""What goes from block to block: the residual stream, and what later blocks need beside it.

    carried = Layout.of(spec, index).taken_apart(x)     # x: [1, S, width], as blocks hand it on
    carried.stream, carried.parts, carried.heads

Most decoders carry the stream alone. Who takes a text through single blocks, as calibration does,
holds one tensor a text and need not know: all of it lies side by side in that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch

from llm_coreml.decoder.spec import CacheSizes, DecoderSpec

Entries = tuple[torch.Tensor, torch.Tensor]


@final
@dataclass(frozen=True)
class Carried:
    """What enters a block, or leaves it.

    Attributes:
        stream: The residual stream, `[1, S, hidden]`.
        parts: What this layer and all after it are given of the tokens, `[1, S, width]` each.
        heads: Keys and values `[1, kv_heads, S, head_dim]` of these tokens in layers before, for
            those that share them, by the layer.
    """

    stream: torch.Tensor
    parts: tuple[torch.Tensor, ...] = ()
    heads: Mapping[int, Entries] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Layout:
    """How all of it lies in one tensor.

    Attributes:
        hidden: Width of the residual stream.
        parts: Widths of the layers' parts.
        heads: Sizes of the keys and values, by the layer.
    """

    hidden: int
    parts: tuple[int, ...]
    heads: Mapping[int, CacheSizes]

    @classmethod
    def of(cls, spec: DecoderSpec, index: int) -> Layout:
        """Return the layout of what enters block `index`, or leaves the last."""
        left = len(spec.layers) - index
        parts = () if spec.per_layer is None else left * (spec.per_layer.width,)
        wanted = {layer.mixer.shares for layer in spec.layers[index:]}
        heads = {
            at: spec.layers[at].mixer.remembers for at in spec.shared if at < index and at in wanted
        }
        return cls(spec.hidden_size, parts, heads)

    def taken_apart(self, x: torch.Tensor) -> Carried:
        """Return what lies in `x` `[1, S, width]`."""
        widths = [size.heads * size.head_dim for size in self.heads.values() for _ in range(2)]
        if not self.parts and not widths:
            return Carried(x)
        stream, *rest = x.split_with_sizes([self.hidden, *self.parts, *widths], dim=-1)
        parts, flat = rest[: len(self.parts)], rest[len(self.parts) :]
        heads = {}
        for at, size in self.heads.items():
            keys, values, *flat = flat
            heads[at] = (_split(keys, size), _split(values, size))
        return Carried(stream, tuple(parts), heads)

    def put_together(self, carried: Carried) -> torch.Tensor:
        """Return all of `carried` side by side, `[1, S, width]`."""
        entries = [_joined(part) for at in self.heads for part in carried.heads[at]]
        together = [carried.stream, *carried.parts, *entries]
        return torch.cat(together, dim=-1) if len(together) > 1 else carried.stream


def _split(x: torch.Tensor, size: CacheSizes) -> torch.Tensor:
    return x.view(1, -1, size.heads, size.head_dim).permute(0, 2, 1, 3)


def _joined(heads: torch.Tensor) -> torch.Tensor:
    return heads.permute(0, 2, 1, 3).flatten(2)
