"""What a trained product beside each matrix wins, held against tables alone at no fewer bytes.

Both ways are calibrated and tuned on the same segments of the calibration text, for as many steps,
and read in PyTorch on held-out text: a palette with few tables and a product of a rank, and one
with as many tables as take the bytes of that product and a few more.

    python benchmarks/recovery_quality.py --bits 2 --rank 4 --tokens 6000 --steps 60 --segments 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from calibration_quality import CONTEXT, segments
from llm_coreml.bundle.record import bits_per_weight
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.eval.heldout import read_windows
from llm_coreml.eval.quality import measure_quality
from llm_coreml.model import Model, open_model
from llm_coreml.progress import Silent
from llm_coreml.quantize.calibrate.text import CalibrationText
from llm_coreml.quantize.low_rank import factor_bits
from llm_coreml.quantize.quantized import build_original, quantize
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner

# Rows and inputs of a table, which cost half a bit per weight.
_TABLES = {2: (2, 64), 3: (2, 128), 4: (2, 256)}


def measured(
    model: Model, config: ExportConfig, text: CalibrationText, original: EagerRunner, tokens: int
) -> tuple[float, float]:
    """Return stored bits per weight of all matrices, and the mean KL on held-out text."""
    found = quantize(model, resolve(config, model.spec), Path("none"), Silent(), calibration=text)
    tokenizer = bundled_model() / "tokenizer.json"
    _, windows = read_windows(None, tokenizer, CONTEXT, tokens)
    runners = {"original": original, "found": EagerRunner(found.decoder, "eager fp32")}
    kl = measure_quality(runners, windows)[1].mean_kl
    assert kl is not None
    return bits_per_weight(found.plan, model.spec, factor_bits(found.decoder)), kl


def main() -> None:
    """Measure both ways for every segment, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=2, choices=sorted(_TABLES))
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--segments", type=int, default=2)
    parser.add_argument("--scored", type=int, default=2048)
    given = parser.parse_args()
    model = open_model(bundled_model())
    original = EagerRunner(build_original(model, CONTEXT), "original")
    rows, columns = _TABLES[given.bits]
    usual = ExportConfig(
        bits=given.bits,
        context=CONTEXT,
        calibrate="bundled",
        calibration_tokens=given.tokens,
        tune=given.steps,
        target="ane",
    )
    ways = {
        "tables alone": usual.under(
            {"codebook_rows": rows, "codebook_columns": columns, "target": "gpu"}
        ),
        f"with lora:{given.rank}": usual.under({"recover": f"lora:{given.rank}"}),
    }
    for number, text in enumerate(segments(bundled_model(), given.tokens, given.segments)):
        for name, config in ways.items():
            bits, kl = measured(model, config, text, original, given.scored)
            print(
                f"segment {number}  {name:14} {bits:.3f} bits per weight  KL {kl:.4f}", flush=True
            )


if __name__ == "__main__":
    main()
