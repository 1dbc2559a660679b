"""Causal self-attention over the whole cache.

Grouped-query attention folds the query heads that share a key/value head into the row axis,
`[1, kv_heads, group * S, head_dim]`, so the cache is read as it lies: no copy per query head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder.chunk import Chunk
from llm_coreml.decoder.matrices import Linear, number
from llm_coreml.decoder.norm import RMSNorm, norm_of
from llm_coreml.decoder.rope import rotate
from llm_coreml.decoder.spec import AttentionSpec, QKNormSpec
from llm_coreml.decoder.states import Slot
from llm_coreml.decoder.wiring import Halt, Matrix, Space, Steps, Wiring

AttentionForm = Literal["fused", "decomposed"]


class Attention(nn.Module):
    """Causal self-attention over the whole cache, masked past the current position.

    Args:
        spec: Sizes and options.
        hidden_size: Width of the residual stream.
        slot: The part of the states that the layer owns.
        form: `fused` keeps `scaled_dot_product_attention` as one op; `decomposed` writes it as
            matmul, softmax, matmul with the scale applied to the queries, safe in fp16. Capped
            scores, and those beside sinks, are always decomposed.
    """

    scale: torch.Tensor | None
    softcap: torch.Tensor | None

    def __init__(
        self, spec: AttentionSpec, hidden_size: int, slot: Slot, form: AttentionForm
    ) -> None:
        super().__init__()
        self.spec = spec
        self.slot = slot
        plain = spec.softcap is None and not spec.sinks
        self.form: AttentionForm = form if plain else "decomposed"
        factor = self._query_factor()
        scale = None if factor is None else torch.tensor([factor])
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("softcap", number(spec.softcap, None), persistent=False)
        query_size = spec.num_attention_heads * spec.head_dim
        kv_size = spec.num_key_value_heads * spec.head_dim
        self.q_proj = Linear(hidden_size, query_size, bias=spec.qkv_bias)
        self.k_proj = Linear(hidden_size, kv_size, bias=spec.qkv_bias)
        self.v_proj = Linear(hidden_size, kv_size, bias=spec.qkv_bias)
        self.o_proj = Linear(query_size, hidden_size, bias=spec.out_bias)
        if spec.gate is not None:
            gates = query_size if spec.gate == "number" else spec.num_attention_heads
            self.gate_proj = Linear(hidden_size, gates, bias=False)
        if spec.sinks:
            self.sinks = nn.Parameter(torch.empty(spec.num_attention_heads), requires_grad=False)
        if spec.qk_norm is not None:
            self.q_norm = self._norm(spec.qk_norm, spec.num_attention_heads)
            self.k_norm = self._norm(spec.qk_norm, spec.num_key_value_heads)

    @property
    def wiring(self) -> Wiring:
        """What each matrix reads and writes."""
        # Numbers that are gated one by one have no other space: a rotation would mix them.
        space: Space | None = None if self.spec.gate == "number" else "heads"
        projections = [
            Matrix("q_proj", reads="residual"),
            Matrix("k_proj", reads="residual"),
            Matrix("v_proj", reads="residual", writes=space),
        ]
        if self.spec.gate is not None:
            projections.append(Matrix("gate_proj", reads="residual"))
        output = Matrix("o_proj", reads=space, writes="residual")
        inner = () if self.spec.qk_norm is None else ("q_norm", "k_norm")
        own = ("",) if self.spec.sinks else ()
        return Wiring((tuple(projections), (output,)), (*inner, *own))

    def steps(self, inputs: Halt, chunk: Chunk) -> Steps:
        """Attend from `inputs` `[1, S, hidden]` to all that each token sees, up to itself."""
        heads = yield partial(self._joined, (yield inputs), chunk)
        return self.o_proj(self.o_proj.arrange(heads))  # type: ignore[no-any-return]

    def _joined(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Return what the heads give, side by side: `[1, S, heads * head_dim]`."""
        spec = self.spec
        x = self.q_proj.arrange(x)  # which is that of keys and values, too
        queries = self._queries(x, chunk)
        queries = queries.reshape(1, spec.num_key_value_heads, -1, spec.head_dim)
        keys = self._keys(x, chunk)
        values = _heads_first(self.v_proj(x).view(1, -1, spec.num_key_value_heads, spec.head_dim))
        cache = chunk.cache(self.slot.state)
        keys, values = cache.update(self.slot.row, keys, values)
        attended = self._attend(queries, keys, values, chunk)
        attended = attended.reshape(1, spec.num_attention_heads, -1, spec.head_dim)
        joined = self._gated(_heads_first(attended), x)
        return joined.reshape(1, -1, spec.num_attention_heads * spec.head_dim)

    def _queries(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Return queries as they meet keys, `[1, heads, S, head_dim]`."""
        norm = None if self.spec.qk_norm is None else self.q_norm
        queries = self._placed(self.q_proj(x), norm, chunk)
        growth = chunk.growth(self.spec)
        if growth is not None:
            queries = queries * growth
        if self.scale is not None and self._scaled_early:
            queries = queries * self.scale
        return _heads_first(queries)

    @property
    def _scaled_early(self) -> bool:
        """Whether queries are scaled before their heads come first.

        Where no reshape lies behind, coremltools would exchange the two, and the scale's rank.
        """
        return self.spec.num_queries_per_kv == 1

    def _keys(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Return keys as they are remembered, `[1, kv_heads, S, head_dim]`."""
        norm = None if self.spec.qk_norm is None else self.k_norm
        return _heads_first(self._placed(self.k_proj(x), norm, chunk))

    def _placed(self, x: torch.Tensor, norm: RMSNorm | None, chunk: Chunk) -> torch.Tensor:
        """Return `x` `[1, S, heads * head_dim]` normed and rotated, `[1, S, heads, head_dim]`."""
        spec = self.spec
        late = spec.qk_norm is not None and spec.qk_norm.rotated
        heads = self._split(x, None if late else norm)
        if spec.rope is not None:
            heads = rotate(heads, *chunk.rotary[spec.rope])
        return norm(heads) if late and norm is not None else heads

    def _split(self, x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        """Return heads `[1, S, heads, head_dim]` of `x` `[1, S, heads * head_dim]`, normed."""
        width, head_dim, kind = x.shape[-1], self.spec.head_dim, self.spec.qk_norm
        if norm is not None and kind is not None and kind.over == "all":
            return norm(x).view(1, -1, width // head_dim, head_dim)  # type: ignore[no-any-return]
        heads = x.view(1, -1, width // head_dim, head_dim)
        return heads if norm is None else norm(heads)

    def _norm(self, spec: QKNormSpec, heads: int) -> RMSNorm:
        """Return the norm of queries or keys of so many heads."""
        size = self.spec.head_dim * (1 if spec.over == "head" else heads)
        return norm_of(spec.norm, size, heads if spec.own else None)

    def _gated(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return `attended` `[1, S, heads, head_dim]` as much as its gates let pass."""
        if self.spec.gate is None:
            return attended
        width = self.spec.head_dim if self.spec.gate == "number" else 1
        gates = torch.sigmoid(self.gate_proj(x))
        return attended * gates.view(1, -1, self.spec.num_attention_heads, width)

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: Chunk
    ) -> torch.Tensor:
        mask = chunk.mask(self.spec)
        if self.scale is not None and not self._scaled_early:
            queries = queries * self.scale
        if self.form == "fused":
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        scores = queries @ keys.permute(0, 1, 3, 2)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores + mask
        if not self.spec.sinks:
            return torch.softmax(scores, dim=-1) @ values
        shares = torch.softmax(torch.cat((scores, self._sinks_of(chunk)), dim=-1), dim=-1)
        return shares[..., :-1] @ values

    def _sinks_of(self, chunk: Chunk) -> torch.Tensor:
        """Return a score for each row, that of its head: `[1, kv_heads, group * S, 1]`."""
        assert chunk.zeros is not None
        scores = (chunk.zeros + self.sinks).permute(1, 0)  # [heads, S]
        return scores.reshape(1, self.spec.num_key_value_heads, -1, 1)

    def _query_factor(self) -> float | None:
        """Return what queries are multiplied by; the fused op has a scale of its own."""
        own = 1 / math.sqrt(self.spec.head_dim)
        scale = own if self.spec.scale is None else self.spec.scale
        if self.form == "decomposed":
            return scale
        return None if self.spec.scale is None else scale / own


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """Exchange positions and heads, by the operator that a lowering need not take apart."""
    return x.permute(0, 2, 1, 3)
