"""The KV cache: two packed buffers that become two Core ML states.

All layers share one buffer for keys and one for values, `[layers, kv_heads, context, head_dim]`:
programs with more than two states have been reported to compile and then fail on device. In an
exported graph a write is the custom op `llm_coreml::kv_write`, which the Core ML lowering turns
into `read_state -> slice_update -> write_state`, in place; eagerly it is a plain slice assignment.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.library.custom_op("llm_coreml::kv_write", mutates_args=())
def kv_write(
    cache: torch.Tensor, update: torch.Tensor, layer: int, start_pos: torch.Tensor
) -> torch.Tensor:
    """Return `cache` with `update` stored at `[layer, :, start_pos : start_pos + S, :]`.

    Args:
        cache: `[layers, kv_heads, context, head_dim]`.
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


class CacheView:
    """The cache during one forward pass.

    Eagerly it writes into the buffers. In an exported graph it carries the updated tensors from
    layer to layer, so that each write is one op on the value before it, and no copy in between.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values

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
        return self.keys[layer : layer + 1], self.values[layer : layer + 1]


class KVCache(nn.Module):
    """Keys and values of every layer for one sequence.

    Args:
        num_layers: Decoder layers.
        num_key_value_heads: Key/value heads of one layer.
        context: Positions that fit.
        head_dim: Width of one head.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(
        self, num_layers: int, num_key_value_heads: int, context: int, head_dim: int
    ) -> None:
        super().__init__()
        shape = (num_layers, num_key_value_heads, context, head_dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)

    def open(self) -> CacheView:
        """Return the view that one forward pass reads and updates."""
        return CacheView(self.keys, self.values)

    def close(self, view: CacheView) -> None:
        """Keep what the pass wrote; eagerly it is in the buffers already."""
        if torch.compiler.is_exporting():
            self.keys.copy_(view.keys)
            self.values.copy_(view.values)

    def reset(self) -> None:
        """Forget the sequence: every entry becomes zero."""
        self.keys.zero_()
        self.values.zero_()
