"""What merged rotations change, on the bundled model: formats and rotations on held-out text.

Every format is made with each rotation, at the same bytes but for the head, and read in PyTorch.
Token table and head are left as they are, so divergences are those of the linear layers alone.

    python benchmarks/rotation_quality.py --formats int4-channel,codebook-3 --calibrate 7000
"""

from __future__ import annotations

import argparse
from typing import get_args

import torch

from llm_coreml.config import ExportConfig, Rotate, resolve
from llm_coreml.eval.heldout import cut, read_text
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.results import Quality
from llm_coreml.model import Model, open_model
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.quantized import build_decoder, read_calibration
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.runner import Runner
from llm_coreml.tokenizer import Tokenizer

TOKENIZER = bundled_model() / "tokenizer.json"
FORMATS = {
    "int4-group": {"scheme": "int4-group"},
    "int4-channel": {"scheme": "int4-channel"},
    **{f"codebook-{bits}": {"scheme": "codebook", "bits": bits} for bits in (4, 3, 2)},
}
ROTATIONS: tuple[Rotate, ...] = get_args(Rotate)


def runner(model: Model, config: ExportConfig) -> Runner:
    """Return the model quantized as `config` says."""
    job = resolve(config, model.spec)
    text = read_calibration(job, TOKENIZER)
    plan = make_plan(job, model.spec)
    return EagerRunner(build_decoder(model, job, plan, calibration=text), "eager")


def measure(formats: list[str], calibrate: int, limit: int) -> dict[str, Quality]:
    """Return the quality of every format with every rotation, and of `original`."""
    model = open_model("llama")
    tokenizer = Tokenizer(TOKENIZER)
    windows = cut(tokenizer.encode(read_text(None)[1]), 1024, tokenizer.beginning, limit)
    runners = {"original": runner(model, ExportConfig(scheme="none", embedding="none"))}
    text = {"calibrate": "bundled", "calibration_tokens": calibrate} if calibrate else {}
    for name in formats:
        for rotate in ROTATIONS:
            config = ExportConfig(**FORMATS[name], **text, embedding="none", rotate=rotate)
            runners[f"{name} {rotate}"] = runner(model, config)
    return {row.name: row for row in measure_quality(runners, windows)}


def table(found: dict[str, Quality], formats: list[str]) -> str:
    """Return the rows as Markdown: perplexity and KL divergence by rotation."""
    heads = "".join(f" {rotate}: ppl | KL |" for rotate in ROTATIONS)
    lines = [f"| format |{heads}", "|---" + "|--:" * 2 * len(ROTATIONS) + "|"]
    for name in formats:
        rows = [found[f"{name} {rotate}"] for rotate in ROTATIONS]
        cells = (f"{row.perplexity:.2f} | {row.mean_kl:.4f}" for row in rows)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="separated by commas")
    parser.add_argument("--calibrate", type=int, default=0, help="tokens to calibrate on")
    parser.add_argument("--heldout", type=int, default=8192, help="tokens to score")
    given = parser.parse_args()
    torch.set_num_threads(1)
    formats = given.formats.split(",")
    found = measure(formats, given.calibrate, given.heldout)
    print(f"unquantized: perplexity {found['original'].perplexity:.2f}\n")
    print(table(found, formats), flush=True)


if __name__ == "__main__":
    main()
