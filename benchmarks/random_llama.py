"""Models with the widths of Llama-3.2-1B or Llama-3.1-8B, random weights and any number of layers.

    python benchmarks/random_llama.py folder 1b 16 hf,meta

It writes `hf/`, a Hugging Face folder with a file for each layer, `hf-text/`, the same with the
bundled model's tokenizer, and with `meta` the same weights as Meta's checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llm_coreml.recipes import bundled_model

_VOCAB, _KV_HEADS = 128256, 8


@dataclass(frozen=True)
class Widths:
    """Sizes of a model; all have 32 heads over 8."""

    hidden: int
    inner: int
    head_dim: int
    tied: bool

    def linears(self) -> dict[str, tuple[str, int, int]]:
        """Return our name of each linear layer -> Meta's, rows, columns."""
        queries, keys = 32 * self.head_dim, _KV_HEADS * self.head_dim
        return {
            "self_attn.q_proj": ("attention.wq", queries, self.hidden),
            "self_attn.k_proj": ("attention.wk", keys, self.hidden),
            "self_attn.v_proj": ("attention.wv", keys, self.hidden),
            "self_attn.o_proj": ("attention.wo", self.hidden, queries),
            "mlp.gate_proj": ("feed_forward.w1", self.inner, self.hidden),
            "mlp.up_proj": ("feed_forward.w3", self.inner, self.hidden),
            "mlp.down_proj": ("feed_forward.w2", self.hidden, self.inner),
        }


MODELS = {"1b": Widths(2048, 8192, 64, True), "8b": Widths(4096, 14336, 128, False)}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


def make_model(folder: str, model: str, layers: str, kinds: str) -> None:
    """Write the model as `hf/`, a file for each layer, and with the same weights as `meta/`."""
    widths, count = MODELS[model], int(layers)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    theirs: dict[str, torch.Tensor] = {}
    both = "meta" in kinds
    # Gains of ones would be left out of a program.
    norm = torch.linspace(0.5, 1.5, widths.hidden).to(torch.bfloat16)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, Path(folder, "hf", name), metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for kind in kinds.split(","):
        Path(folder, kind).mkdir()
    table = draw(_VOCAB, widths.hidden)
    head = table if widths.tied else draw(_VOCAB, widths.hidden)
    ends = {"model.embed_tokens.weight": table, "model.norm.weight": norm}
    write("ends.safetensors", ends if widths.tied else {**ends, "lm_head.weight": head})
    if both:  # Meta writes the tied head out.
        theirs = {"tok_embeddings.weight": table, "output.weight": head, "norm.weight": norm}
    del table, head, ends
    for layer in range(count):
        ours = {}
        for name, (metas, rows, columns) in widths.linears().items():
            weight = draw(rows, columns)
            ours[f"model.layers.{layer}.{name}.weight"] = weight
            if both:
                theirs[f"layers.{layer}.{metas}.weight"] = _in_metas_order(name, weight)
        for name, metas in _NORMS.items():
            ours[f"model.layers.{layer}.{name}.weight"] = norm.clone()
            if both:
                theirs[f"layers.{layer}.{metas}.weight"] = norm.clone()
        write(f"layer-{layer}.safetensors", ours)
    _write_configs(Path(folder), widths, count, index)
    if both:
        torch.save(theirs, Path(folder, "meta", "consolidated.00.pth"))
        Path(folder, "meta", "params.json").write_text(json.dumps(_metas_params(widths, count)))


def _write_configs(folder: Path, widths: Widths, layers: int, index: dict[str, str]) -> None:
    """Complete `hf/`, and make `hf-text/`: the same with a tokenizer, for what reads text."""
    plain, text = folder / "hf", folder / "hf-text"
    (plain / "config.json").write_text(json.dumps(_hf_config(widths, layers)))
    listed = {"metadata": {}, "weight_map": index}
    (plain / "model.safetensors.index.json").write_text(json.dumps(listed))
    text.mkdir()
    for path in plain.iterdir():
        os.link(path, text / path.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (text / name).write_bytes((bundled_model() / name).read_bytes())


def _in_metas_order(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Interleave the two halves of each head, as Meta's RoPE wants queries and keys."""
    if name not in ("self_attn.q_proj", "self_attn.k_proj"):
        return weight
    rows, columns = weight.shape
    halves = weight.view(32 if name.endswith("q_proj") else _KV_HEADS, 2, -1, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _hf_config(widths: Widths, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": widths.hidden,
        "intermediate_size": widths.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": widths.head_dim,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": widths.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


def _metas_params(widths: Widths, layers: int) -> dict[str, Any]:
    return {
        "dim": widths.hidden,
        "ffn_dim_multiplier": 1.5,
        "multiple_of": 256,
        "n_heads": 32,
        "n_kv_heads": _KV_HEADS,
        "n_layers": layers,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "rope_scale_factor": 32,
        "vocab_size": _VOCAB,
    }


if __name__ == "__main__":
    make_model(*sys.argv[1:])
