"""Causal self-attention over the whole cache.

Grouped-query attention folds the query heads that share a key/value head into the row axis,
`[1, kv_heads, group * S, head_dim]`, so the cache is read as it lies: no copy per query head.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder.chunk import Chunk
from llm_coreml.decoder.linear import Linear
from llm_coreml.decoder.rope import rotate
from llm_coreml.decoder.spec import DecoderSpec

AttentionForm = Literal["fused", "decomposed"]


class Attention(nn.Module):
    """Causal self-attention over the whole cache, masked past the current position.

    Args:
        spec: Sizes of the decoder.
        layer: Index of the layer, the row of the cache that it owns.
        form: `fused` keeps `scaled_dot_product_attention` as one op; `decomposed` writes it as
            matmul, softmax, matmul with the scale applied to the queries, safe in fp16.
    """

    scale: torch.Tensor

    def __init__(self, spec: DecoderSpec, layer: int, form: AttentionForm) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.form = form
        if form == "decomposed":
            scale = torch.tensor([1 / math.sqrt(spec.head_dim)])
            self.register_buffer("scale", scale, persistent=False)
        hidden, head_dim = spec.hidden_size, spec.head_dim
        query_size = spec.num_attention_heads * head_dim
        kv_size = spec.num_key_value_heads * head_dim
        self.q_proj = Linear(hidden, query_size, bias=spec.attention_bias)
        self.k_proj = Linear(hidden, kv_size, bias=spec.attention_bias)
        self.v_proj = Linear(hidden, kv_size, bias=spec.attention_bias)
        self.o_proj = Linear(query_size, hidden, bias=spec.attention_bias)

    def forward(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Attend from `x` `[1, S, hidden]` to everything up to each token's own position."""
        return self.o_proj(self.o_proj.arrange(self.joined(x, chunk)))  # type: ignore[no-any-return]

    def joined(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Return what the heads give, side by side: `[1, S, heads * head_dim]`."""
        spec = self.spec
        heads = (1, -1, spec.num_key_value_heads, spec.head_dim)
        x = self.q_proj.arrange(x)  # which is that of keys and values, too
        queries = self.q_proj(x).view(1, -1, spec.num_attention_heads, spec.head_dim)
        queries = _heads_first(rotate(queries, chunk.cos, chunk.sin))  # [1, heads, S, head_dim]
        queries = queries.reshape(1, spec.num_key_value_heads, -1, spec.head_dim)
        keys = _heads_first(rotate(self.k_proj(x).view(heads), chunk.cos, chunk.sin))
        values = _heads_first(self.v_proj(x).view(heads))
        keys, values = chunk.cache.update(self.layer, keys, values, chunk.start_pos)
        attended = self._attend(queries, keys, values, chunk.mask)
        attended = attended.reshape(1, spec.num_attention_heads, -1, spec.head_dim)
        width = spec.num_attention_heads * spec.head_dim
        return _heads_first(attended).reshape(1, -1, width)

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        if self.form == "fused":
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        scores = (queries * self.scale) @ keys.permute(0, 1, 3, 2)
        return torch.softmax(scores + mask, dim=-1) @ values


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """Exchange positions and heads, by the operator that a lowering need not take apart."""
    return x.permute(0, 2, 1, 3)
