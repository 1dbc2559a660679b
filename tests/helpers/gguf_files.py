"""Tiny GGUF models, written by llama.cpp's own package, with the values that they mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from tiny import llama

Array = np.ndarray[Any, Any]
Write = Callable[[gguf.GGUFWriter], None]
HEADS, KEY_HEADS = 4, 2
_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Where each block has fp16 numbers, which random bytes must not fill. IQ1_M deals the bits of its
# only one out to four half bytes.
_HALVES: dict[Kind, tuple[int, ...]] = {
    Kind.IQ4_NL: (0,),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ1_S: (0,),
    Kind.IQ2_XXS: (0,),
    Kind.IQ2_XS: (0,),
    Kind.IQ2_S: (0,),
    Kind.IQ3_XXS: (0,),
    Kind.IQ3_S: (0,),
    Kind.IQ4_XS: (0,),
}


def blocks(kind: Kind, weight: Array) -> Array:
    """Return rows of blocks: the package's rounding, or random blocks where it has none."""
    if kind not in _HALVES:
        return quants.quantize(weight, kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    found = rng.integers(0, 256, (len(weight), weight.shape[1] // elements, size), np.uint8)
    for start in _HALVES[kind]:
        numbers = rng.uniform(1e-4, 2e-4, (*found.shape[:2], 1)).astype(np.float16)
        found[:, :, start : start + 2] = numbers.view(np.uint8)
    return found.reshape(len(weight), -1)


def reordered(rows: Array, heads: int) -> Array:
    """Put the rows of q or k as llama.cpp has them: the halves of each head interleaved."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tiny(**changes: Any) -> Any:
    """Return a model whose rows are whole blocks of any type, one group of it without values."""
    model = llama(**{"hidden_size": 256, "intermediate_size": 256, "vocab_size": 64, **changes})
    model.model.layers[0].mlp.gate_proj.weight.data[3, 32:64] = 0
    return model


def describe(writer: gguf.GGUFWriter, model: Any) -> None:
    """Write the metadata that llama.cpp's converter writes of a Llama."""
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def tokens(writer: gguf.GGUFWriter) -> None:
    """Write a vocabulary that nothing can be read with."""
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "</s>", "a"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])


def write(
    path: Path,
    model: Any,
    kinds: dict[str, Kind],
    *,
    architecture: str = "llama",
    vocabulary: Write = tokens,
    extra: Write = lambda writer: None,
    only: Callable[[str], bool] = lambda name: True,
) -> dict[str, Array]:
    """Write a model as llama.cpp lays it out; return its values by `transformers` names.

    Args:
        path: The file.
        model: A Llama.
        kinds: The type of each matrix by the end of its name; others become F16.
        architecture: What the file says it holds.
        vocabulary: Writes the tokenizer.
        extra: Writes more metadata or tensors.
        only: Picks the tensors of this part of a split model.
    """
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer, model)
    vocabulary(writer)
    meant = {}
    config = model.config
    for name, tensor in model.state_dict().items():
        if not only(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        module, _, suffix = name.rpartition(".")
        stored = f"{_named(module)}.{suffix}"
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            module.rpartition(".")[2]
        )
        if values.ndim == 1:
            meant[name] = values
            writer.add_tensor(stored, reordered(values, heads) if heads else values)
            continue
        kind = kinds.get(module.rpartition(".")[2], Kind.F16)
        rows = values.astype(np.float16) if kind == Kind.F16 else blocks(kind, values)
        meant[name] = rows if kind == Kind.F16 else quants.dequantize(rows, kind)
        raw = None if kind == Kind.F16 else kind
        writer.add_tensor(stored, reordered(rows, heads) if heads else rows, raw_dtype=raw)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _named(module: str) -> str:
    if module in _TOP:
        return _TOP[module]
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_PARTS[rest]}"
