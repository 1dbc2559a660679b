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

from llm_coreml.decoder.carried import Entries
from llm_coreml.decoder.chunk import Chunk
from llm_coreml.decoder.matrices import Linear, SoftCap
from llm_coreml.decoder.norm import RMSNorm, norm_of
from llm_coreml.decoder.rope import rotate, rotate_at_once
from llm_coreml.decoder.spec import AttentionSpec, QKNormSpec
from llm_coreml.decoder.states import Slot
from llm_coreml.decoder.wiring import Halt, Matrix, Space, Steps, Wiring
from llm_coreml.targets import Operations

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
        kept_as: The number of its layer, if later ones share its keys and values.
        operations: `fewest` has queries, keys and values become heads together, and be rotated
            at once, where nothing is done to one of them alone that needs rows.

    Attributes:
        together: They are.
    """

    scale: torch.Tensor | None

    def __init__(
        self,
        spec: AttentionSpec,
        hidden_size: int,
        slot: Slot,
        form: AttentionForm,
        kept_as: int | None = None,
        operations: Operations = "usual",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.slot = slot
        self.kept_as = kept_as
        self.together = operations == "fewest" and _can_be_together(spec)
        plain = spec.softcap is None and not spec.sinks
        self.form: AttentionForm = form if plain else "decomposed"
        self.softcap = None if spec.softcap is None else SoftCap(spec.softcap)
        factor = self._query_factor()
        scale = None if factor is None else torch.tensor([factor])
        self.register_buffer("scale", scale, persistent=False)
        query_size = spec.num_attention_heads * spec.head_dim
        kv_size = spec.num_key_value_heads * spec.head_dim
        self.q_proj = Linear(hidden_size, query_size, bias=spec.qkv_bias)
        if spec.shares is None:
            self.k_proj = Linear(hidden_size, kv_size, bias=spec.qkv_bias)
        if spec.shares is None and not spec.keys_are_values:
            self.v_proj = Linear(hidden_size, kv_size, bias=spec.qkv_bias)
        self.o_proj = Linear(query_size, hidden_size, bias=spec.out_bias)
        if spec.inner_norm is not None:
            self.inner_norm = norm_of(spec.inner_norm, query_size)
        if spec.gate is not None:
            gates = query_size if spec.gate == "number" else spec.num_attention_heads
            self.gate_proj = Linear(hidden_size, gates, bias=False)
        if spec.sinks:
            self.sinks = nn.Parameter(torch.empty(spec.num_attention_heads), requires_grad=False)
        if spec.qk_norm is not None:
            self.q_norm = self._norm(spec.qk_norm, spec.num_attention_heads)
            if spec.shares is None:
                self.k_norm = self._norm(spec.qk_norm, spec.num_key_value_heads)
        if spec.value_norm is not None and spec.shares is None:
            self.v_norm = norm_of(spec.value_norm, spec.head_dim)

    @property
    def wiring(self) -> Wiring:
        """What each matrix reads and writes."""
        spec = self.spec
        # Numbers that are changed one by one have no other space: a rotation would mix them. Nor
        # have keys that are values.
        apart = spec.changes_numbers or spec.keys_are_values
        space: Space | None = None if apart else "heads"
        projections = [Matrix("q_proj", reads="residual")]
        if spec.shares is None:
            projections.append(Matrix("k_proj", reads="residual"))
        if spec.shares is None and not spec.keys_are_values:
            projections.append(Matrix("v_proj", reads="residual", writes=space))
        if spec.gate is not None:
            projections.append(Matrix("gate_proj", reads="residual"))
        output = Matrix("o_proj", reads=space, writes="residual")
        normed = ("q_norm", "k_norm") if spec.shares is None else ("q_norm",)
        inner = () if spec.qk_norm is None else normed
        own = ("",) if spec.sinks else ()
        last = () if spec.inner_norm is None else ("inner_norm",)
        return Wiring((tuple(projections), (output,)), (*inner, *last, *own))

    def steps(self, inputs: Halt, chunk: Chunk, heads: dict[int, Entries]) -> Steps:
        """Attend from `inputs` `[1, S, hidden]` to all that each token sees, up to itself.

        Args:
            inputs: What is read.
            chunk: What every layer is told.
            heads: New keys and values by their layer, taken from or added to where layers share.
        """
        attended = yield partial(self._joined, (yield inputs), chunk, heads)
        return self.o_proj(self.o_proj.arrange(attended))  # type: ignore[no-any-return]

    def _joined(self, x: torch.Tensor, chunk: Chunk, heads: dict[int, Entries]) -> torch.Tensor:
        """Return what the heads give, side by side: `[1, S, heads * head_dim]`."""
        spec = self.spec
        x = self.q_proj.arrange(x)  # which is that of keys and values, too
        # In this order: it is in the bytes of every program.
        queries, *new = self._heads(x, chunk) if self.together else (self._queries(x, chunk),)
        queries = queries.reshape(1, spec.num_key_value_heads, -1, spec.head_dim)
        if self.together:
            keys, values = self._remembered(new[0], new[1], chunk, heads)
        else:
            keys, values = self._attended(x, chunk, heads)
        attended = self._attend(queries, keys, values, chunk)
        attended = attended.reshape(1, spec.num_attention_heads, -1, spec.head_dim)
        gated = self._gated(_heads_first(attended), x)
        joined = gated.reshape(1, -1, spec.num_attention_heads * spec.head_dim)
        return joined if spec.inner_norm is None else self.inner_norm(joined)

    def _queries(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Return queries as they meet keys, `[1, heads, S, head_dim]`."""
        norm = None if self.spec.qk_norm is None else self.q_norm
        queries = self._placed(self._clipped(self.q_proj(x)), norm, chunk)
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

    def _attended(self, x: torch.Tensor, chunk: Chunk, heads: dict[int, Entries]) -> Entries:
        """Return keys and values of all positions, `[1, kv_heads, positions, head_dim]` each."""
        cache, row = chunk.cache(self.slot.state), self.slot.row
        if self.spec.shares is not None:
            keys, values = cache.shared(row, *heads[self.spec.shares])
            seen = chunk.mask(self.spec).shape[-1]
            if seen < keys.shape[2]:  # of a text that is read in parts, later ones are there
                keys, values = keys[:, :, :seen], values[:, :, :seen]
            return keys, values
        return self._remembered(self._keys(x, chunk), self._values(x), chunk, heads)

    def _remembered(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        chunk: Chunk,
        heads: dict[int, Entries],
    ) -> Entries:
        """Return what `_attended` does, of new keys and values `[1, kv_heads, S, head_dim]`."""
        if self.kept_as is not None:
            heads[self.kept_as] = keys, values
        return chunk.cache(self.slot.state).update(self.slot.row, keys, values)

    def _heads(self, x: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values as they meet, `[1, heads, S, head_dim]` each."""
        spec, kind = self.spec, self.spec.qk_norm
        counts = [spec.num_attention_heads, spec.num_key_value_heads]
        products = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        rows = self._clipped(products).view(1, -1, sum(counts) + counts[1], spec.head_dim)
        turned, values = _heads_first(rows).split_with_sizes([sum(counts), counts[1]], dim=1)
        if kind is not None and not kind.rotated:
            queries, keys = turned.split_with_sizes(counts, dim=1)
            turned = torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=1)
        assert spec.rope is not None
        turned = rotate_at_once(turned, *chunk.turns[spec.rope])
        queries, keys = turned.split_with_sizes(counts, dim=1)
        if kind is not None and kind.rotated:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if spec.value_norm is not None:
            values = self.v_norm(values)
        return queries, keys, values

    def _values(self, x: torch.Tensor) -> torch.Tensor:
        """Return new values `[1, kv_heads, S, head_dim]`."""
        products = self.k_proj(x) if self.spec.keys_are_values else self.v_proj(x)
        values = self._clipped(products).view(
            1, -1, self.spec.num_key_value_heads, self.spec.head_dim
        )
        if self.spec.value_norm is not None:
            values = self.v_norm(values)
        return _heads_first(values)

    def _keys(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Return keys as they are remembered, `[1, kv_heads, S, head_dim]`."""
        norm = None if self.spec.qk_norm is None else self.k_norm
        return _heads_first(self._placed(self._clipped(self.k_proj(x)), norm, chunk))

    def _clipped(self, products: torch.Tensor) -> torch.Tensor:
        """Return products of queries, keys or values as far from zero as they may be."""
        clip = self.spec.clip
        return products if clip is None else products.clamp(-clip, clip)

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
        if self.scale is not None and (self.together or not self._scaled_early):
            queries = queries * self.scale
        if self.form == "fused":
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        scores = queries @ keys.permute(0, 1, 3, 2)
        if self.softcap is not None:
            scores = self.softcap(scores)
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


def _can_be_together(spec: AttentionSpec) -> bool:
    """Return whether queries, keys and values can be what `Attention._heads` makes of them."""
    own = spec.shares is None and not spec.keys_are_values
    by_head = spec.qk_norm is None or (spec.qk_norm.over == "head" and not spec.qk_norm.own)
    return own and by_head and spec.rope is not None and spec.query_growth is None


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """Exchange positions and heads, by the operator that a lowering need not take apart."""
    return x.permute(0, 2, 1, 3)
