"""ExecuTorch's own Core ML script for Llama: a tiny checkpoint, its exports, its eager model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = "executorch.examples.apple.coreml.llama.export_static_llm_coreml"
CONTEXT, INPUT, SPLIT = 32, 8, 48
PARAMS: dict[str, Any] = {
    "dim": 64,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 96,
}
# One process runs the script's `main` for every list of arguments: its imports take longest.
_DRIVER = f"""
import json, sys
from {SCRIPT} import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    main()
"""


def write_checkpoint(folder: Path) -> None:
    """Write random weights under Meta's names, as `m.pth` and `p.json`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.15

    width, inner, vocabulary = PARAMS["dim"], PARAMS["hidden_dim"], PARAMS["vocab_size"]
    keys = width // PARAMS["n_heads"] * PARAMS["n_kv_heads"]
    weights = {"tok_embeddings": draw(vocabulary, width), "output": draw(vocabulary, width)}
    weights["norm"] = 1 + draw(width)
    for layer in range(PARAMS["n_layers"]):
        weights |= {
            f"layers.{layer}.attention.wq": draw(width, width),
            f"layers.{layer}.attention.wk": draw(keys, width),
            f"layers.{layer}.attention.wv": draw(keys, width),
            f"layers.{layer}.attention.wo": draw(width, width),
            f"layers.{layer}.feed_forward.w1": draw(inner, width),
            f"layers.{layer}.feed_forward.w3": draw(inner, width),
            f"layers.{layer}.feed_forward.w2": draw(width, inner),
            f"layers.{layer}.attention_norm": 1 + draw(width),
            f"layers.{layer}.ffn_norm": 1 + draw(width),
        }
    named = {f"{name}.weight": value for name, value in weights.items()}
    torch.save(named, folder / "m.pth")
    (folder / "p.json").write_text(json.dumps(PARAMS))


def export(folder: Path, cases: dict[str, list[str]]) -> dict[str, Path]:
    """Run the script on the checkpoint in `folder`, once per name and further arguments."""
    paths = {name: folder / f"{name}.pte" for name in cases}
    common = ["--checkpoint", str(folder / "m.pth"), "--params", str(folder / "p.json")]
    common += ["--max_context_len", str(CONTEXT), "--input_len", str(INPUT)]
    common += ["--target_split_size", str(SPLIT)]
    calls = [[*common, "--output", str(paths[name]), *more] for name, more in cases.items()]
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps(calls)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return paths


def eager(folder: Path, *, quantize: str, dtype: torch.dtype, full_logits: bool) -> Any:
    """Return the script's own model, quantized, and its `ModelArgs`."""
    from importlib import import_module

    script = import_module(SCRIPT)
    model, args = script.load_model(
        str(folder / "m.pth"), str(folder / "p.json"), CONTEXT, generate_full_logits=full_logits
    )
    settings = argparse.Namespace(
        target_split_size=SPLIT,
        max_splits=8,
        embedding_quantize="8,0",
        linear_quantize=quantize,
        no_graph_breaks=True,
    )
    return script._transform_eager_model(model, settings, dtype), args
