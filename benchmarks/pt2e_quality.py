"""What PT2E's 8 bits cost on the bundled model, beside formats of weights alone, on held-out text.

Token table and head are left as they are, so divergences are those of the linear layers alone. All
are read in PyTorch.

    python benchmarks/pt2e_quality.py --calibrate 8192 --heldout 8192
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.eval.heldout import cut, read_text
from llm_coreml.eval.quality import measure_quality
from llm_coreml.model import Model, open_model
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.quantized import build_decoder, read_calibration
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.tokenizer import Tokenizer

TOKENIZER = bundled_model() / "tokenizer.json"


def rows(tokens: int) -> dict[str, dict[str, Any]]:
    """Return the settings of each row, calibrated on so many tokens where one reads a text."""
    return {
        "original": {"scheme": "none"},
        "--pt2e weights": {"pt2e": "weights"},
        "--pt2e static": {
            "pt2e": "static",
            "calibrate": "bundled",
            "calibration_tokens": tokens,
        },
        "--scheme int8-channel": {"scheme": "int8-channel"},
        "--scheme int8-group": {"scheme": "int8-group"},
        "--scheme codebook --bits 6": {"scheme": "codebook", "bits": 6},
        "--scheme int4-group": {"scheme": "int4-group"},
    }


def runner(model: Model, settings: dict[str, Any]) -> EagerRunner:
    """Return the model quantized as `settings` say."""
    job = resolve(ExportConfig(**settings, embedding="none"), model.spec)
    text = read_calibration(job, TOKENIZER)
    plan = make_plan(job, model.spec)
    return EagerRunner(build_decoder(model, job, plan, calibration=text), "eager")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calibrate", type=int, default=8192, help="tokens to calibrate on")
    parser.add_argument("--heldout", type=int, default=8192, help="tokens to score")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = open_model("llama"), Tokenizer(TOKENIZER)
    windows = cut(tokenizer.encode(read_text(None)[1]), 1024, tokenizer.beginning, given.heldout)
    runners = {name: runner(model, each) for name, each in rows(given.calibrate).items()}
    print("| linear layers | perplexity | KL divergence |\n|---|--:|--:|")
    for row in measure_quality(runners, windows):
        distance = "" if row.mean_kl is None else f"{row.mean_kl:.5f}"
        print(f"| `{row.name}` | {row.perplexity:.2f} | {distance} |", flush=True)


if __name__ == "__main__":
    main()
