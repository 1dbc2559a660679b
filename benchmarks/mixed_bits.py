"""What mixing formats is worth on the bundled model, and how true the losses are that it goes by.

Formats are mixed for several means of bits per weight, and read on the held-out text in PyTorch
beside uniform formats; divergences are from the model with unquantized blocks. Bits count scales
and tables, over the linear layers of the blocks. Then every matrix is quantized alone in every
format, and the divergence that this makes on the text that formats are chosen on is held against
the estimate.

    python benchmarks/mixed_bits.py --bits 2.5,3.5 --tokens 4096
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.eval.heldout import cut, read_text
from llm_coreml.eval.quality import measure_quality
from llm_coreml.fidelity import kl_divergence
from llm_coreml.model import Model, open_model
from llm_coreml.quantize import QuantizationPlan, Scheme, make_plan
from llm_coreml.quantize.calibrate.text import BUNDLED_TEXT, read_content, tokenize
from llm_coreml.quantize.formats.round import dense_rows, quantized
from llm_coreml.quantize.plan.allocate import Option, allocate
from llm_coreml.quantize.plan.budget import mixed_options
from llm_coreml.quantize.plan.plan import matrices
from llm_coreml.quantize.plan.sensitivity import Losses, sensitivities
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.tokenizer import Tokenizer

TOKENIZER = bundled_model() / "tokenizer.json"
UNQUANTIZED = ExportConfig(scheme="none")
UNIFORM = {
    "codebook 2": ExportConfig(bits=2),
    "codebook 3": ExportConfig(bits=3),
    "codebook 3, a table per row": ExportConfig(bits=3, codebook_rows=1),
    "codebook 4": ExportConfig(scheme="codebook"),
    "int4 per channel": ExportConfig(scheme="int4-channel"),
    "int4 group 32": ExportConfig(),
    "codebook 6": ExportConfig(bits=6),
    "int8 per channel": ExportConfig(bits=8),
}


def windows() -> tuple[tuple[int, ...], ...]:
    """Return what an export reads to choose formats."""
    return tokenize(BUNDLED_TEXT, read_content(BUNDLED_TEXT), TOKENIZER, 1024, 128).windows


def mean_bits(model: Model, plan: QuantizationPlan) -> float:
    """Return bits per weight over the linear layers of the blocks."""
    shapes = dict(matrices(model.spec))
    stored = sum(plan.scheme_of(name).stored_bits(shape) for name, shape in shapes.items())
    return stored / sum(rows * columns for rows, columns in shapes.values())


def mixed(model: Model, losses: Losses, bits: float) -> QuantizationPlan:
    """Return the plan of a mean of bits; whole ones too, which an export takes for one format."""
    job = resolve(ExportConfig(bits=3.5), model.spec)
    options, shapes = mixed_options(job, model.spec), dict(matrices(model.spec))
    items = [
        [
            Option(scheme.stored_bits(shapes[name]), loss)
            for scheme, loss in zip(schemes, losses[name], strict=True)
        ]
        for name, schemes in options.items()
    ]
    weights = sum(rows * columns for rows, columns in shapes.values())
    chosen = zip(options, allocate(items, math.floor(bits * weights)), strict=True)
    return make_plan(job, model.spec, {name: options[name][at] for name, at in chosen})


def qualities(
    model: Model, plans: Mapping[str, QuantizationPlan], tokens: int
) -> list[dict[str, Any]]:
    """Return perplexity and divergence of every plan on held-out text."""
    job = resolve(UNQUANTIZED, model.spec)
    original = make_plan(job, model.spec)
    tokenizer = Tokenizer(TOKENIZER)
    text = cut(tokenizer.encode(read_text(None)[1]), 1024, tokenizer.beginning, tokens)
    rows = []
    for name, plan in plans.items():
        runners = {
            label: EagerRunner(build_decoder(model, job, p), "eager")
            for label, p in (("original", original), (name, plan))
        }
        before, after = measure_quality(runners, text)
        rows.append(
            {
                "name": name,
                "bits": mean_bits(model, plan),
                "perplexity": after.perplexity,
                "kl": after.mean_kl,
                "original": before.perplexity,
            }
        )
    return rows


def rows_of(decoder: Any) -> torch.Tensor:
    """Return the logits of the text that formats are chosen on, `[tokens, vocab]`."""
    found = []
    for window in windows():
        decoder.reset()
        with torch.inference_mode():
            hidden = decoder.hidden(torch.tensor([list(window)]), torch.tensor([0]))
            found.append(decoder.head(hidden)[0])
    return torch.cat(found)


def measured(model: Model) -> Iterator[tuple[str, int, Scheme, float]]:
    """Quantize every matrix alone: its name, which format, and the divergence that was measured."""
    job = resolve(UNQUANTIZED, model.spec)
    decoder = build_decoder(model, job, make_plan(job, model.spec))
    wanted = rows_of(decoder)
    for name, schemes in mixed_options(
        resolve(ExportConfig(bits=3.5), model.spec), model.spec
    ).items():
        linear = decoder.get_submodule(name)
        weight = linear.get_parameter("weight")
        for at, scheme in enumerate(schemes):
            dense = torch.cat(list(dense_rows(quantized(scheme, weight.detach()))))
            linear.weight = nn.Parameter(dense, requires_grad=False)
            yield name, at, scheme, float(kl_divergence(wanted, rows_of(decoder)).mean())
        linear.weight = weight


def truths(model: Model, losses: Losses) -> list[dict[str, Any]]:
    """Return for every format how estimates compare with measurements, over all matrices."""
    ratios: dict[str, list[float]] = {}
    for name, at, scheme, kl in measured(model):
        ratios.setdefault(scheme.label, []).append(losses[name][at] / kl)
    return [
        {
            "name": label,
            "mean": statistics.geometric_mean(found),
            "spread": math.exp(statistics.stdev(map(math.log, found))),
            "least": min(found),
            "most": max(found),
        }
        for label, found in ratios.items()
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", default="2.5,3,3.5,4,5")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--format", choices=["human", "json"], default="human")
    arguments = parser.parse_args()
    model = open_model("llama")
    options = mixed_options(resolve(ExportConfig(bits=3.5), model.spec), model.spec)
    start = time.monotonic()
    losses = sensitivities(model.weights, model.spec, windows(), options)
    seconds = time.monotonic() - start
    plans = {
        name: make_plan(resolve(config, model.spec), model.spec) for name, config in UNIFORM.items()
    }
    wanted = [float(bits) for bits in arguments.bits.split(",")]
    plans |= {f"mixed {bits:g}": mixed(model, losses, bits) for bits in wanted}
    rows = sorted(qualities(model, plans, arguments.tokens), key=lambda row: row["bits"])
    found = {"seconds": seconds, "qualities": rows, "estimates": truths(model, losses)}
    if arguments.format == "json":
        print(json.dumps(found, indent=2))
        return
    print(f"losses of {sum(map(len, options.values()))} formats in {seconds:.0f} s")
    print(f"perplexity with unquantized blocks {rows[0]['original']:.2f}")
    print("| formats | bits per weight | perplexity | mean KL |\n|---|--:|--:|--:|")
    for row in rows:
        print("| {name} | {bits:.2f} | {perplexity:.2f} | {kl:.4f} |".format(**row))
    print("\n| format | estimate / measured | spread | least | most |\n|---|--:|--:|--:|--:|")
    for row in found["estimates"]:
        print("| {name} | {mean:.2f} | {spread:.2f} | {least:.2f} | {most:.2f} |".format(**row))


if __name__ == "__main__":
    main()
