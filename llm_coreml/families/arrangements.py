"""How families store the matrices of a layer, other than one by one and rotated by halves.

Names(modules=FUSED_GATE, values=lambda spec, layer: {**interleaved(spec, layer), **gate_up(layer)})
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llm_coreml.checkpoint.value_maps import (
    Blocks,
    Interleaved,
    InterleavedGain,
    RowChoice,
    Rows,
    ValueMap,
)
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec

# What transformers calls matrices that are stored as one, and those of a plain MLP.
FUSED_QKV: Mapping[str, str] = MappingProxyType(
    {f"self_attn.{kind}_proj": "self_attn.qkv_proj" for kind in "qkv"}
)
FUSED_HEADS: Mapping[str, str] = MappingProxyType(
    {f"self_attn.{kind}_proj": "self_attn.query_key_value" for kind in "qkv"}
)
FUSED_GATE: Mapping[str, str] = MappingProxyType(
    {f"mlp.{kind}_proj": "mlp.gate_up_proj" for kind in ("gate", "up")}
)

FOUR_TIMES: Mapping[str, str] = MappingProxyType(
    {"mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"}
)


def qkv_rows(layer: LayerSpec) -> dict[str, RowChoice]:
    """Return where queries, keys and values lie in a matrix of all of them."""
    attention = layer.mixer
    queries = attention.num_attention_heads * attention.head_dim
    ends = [
        queries + kinds * attention.num_key_value_heads * attention.head_dim for kinds in (1, 2)
    ]
    return {
        "self_attn.q_proj": Rows(0, queries, of=ends[1]),
        "self_attn.k_proj": Rows(queries, ends[0], of=ends[1]),
        "self_attn.v_proj": Rows(ends[0], ends[1], of=ends[1]),
    }


def gate_up(layer: LayerSpec) -> dict[str, RowChoice]:
    """Return where the gate and its neighbour lie in a matrix of both."""
    inner = layer.feed_forward.intermediate_size
    return {
        "mlp.gate_proj": Rows(0, inner, of=2 * inner),
        "mlp.up_proj": Rows(inner, 2 * inner, of=2 * inner),
    }


def interleaved(spec: DecoderSpec, layer: LayerSpec) -> dict[str, RowChoice]:
    """Return how queries and keys become such that are rotated by halves, if they are rotated."""
    attention = layer.mixer
    if attention.rope is None:
        return {}
    dim = spec.rotary[attention.rope].dim
    return {
        "self_attn.q_proj": Interleaved(attention.num_attention_heads, dim),
        "self_attn.k_proj": Interleaved(attention.num_key_value_heads, dim),
    }


def interleaved_gains(spec: DecoderSpec, layer: LayerSpec) -> dict[str, ValueMap]:
    """Return the same for the gains of norms of each head's queries and keys."""
    if layer.mixer.rope is None:
        return {}
    gain = InterleavedGain(spec.rotary[layer.mixer.rope].dim)
    return {"self_attn.q_norm": gain, "self_attn.k_norm": gain}


def qkv_blocks(layer: LayerSpec) -> dict[str, RowChoice]:
    """Return where queries, keys and values lie where each key/value head has its own together."""
    attention = layer.mixer
    group, dim = attention.num_queries_per_kv, attention.head_dim
    ends = (0, group * dim, (group + 1) * dim, (group + 2) * dim)
    return {
        f"self_attn.{kind}_proj": Blocks(
            ends[at], ends[at + 1], of=ends[-1], count=attention.num_key_value_heads
        )
        for at, kind in enumerate("qkv")
    }
