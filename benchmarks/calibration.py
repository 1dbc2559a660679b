"""What calibration and tuning win back of what plain rounding loses, on a small model.

Every format is made by torchao, by this package without data, and, for each of several segments of
the calibration text, calibrated, and calibrated and tuned; all at the same bytes. They are read in
PyTorch on held-out text. "recovered" is the share of the loss of torchao's rounding that is undone:
of the perplexity, and of the divergence from the unquantized blocks. With --artifacts every format
is also exported as it was calibrated on the bundled text, and the file is measured instead.

    python benchmarks/calibration.py --formats int4-group-32,codebook-3 --tokens 14000 --tune 200
    python scripts/train_demo_model.py --output other --seed 1 --steps 200 --decay-steps 60
    python benchmarks/calibration.py --model other
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.results import Quality
from llm_coreml.eval.text import cut
from llm_coreml.recipes import bundled_model
from torchao.prototype.quantization.codebook_coreml import CodebookWeightOnlyConfig
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

import llm_coreml
from llm_coreml.build import Model, build_decoder, open_model, plan_for
from llm_coreml.config import ExportConfig
from llm_coreml.decoder import Decoder
from llm_coreml.quantize.text import CalibrationText, tokenize
from llm_coreml.quantize.tune import tune
from llm_coreml.runtime import EagerRunner
from llm_coreml.tokenizer import Tokenizer

CONTEXT = 512
FORMATS = {
    **{f"int4-group-{n}": {"scheme": "int4-group", "group_size": n} for n in (16, 32, 64)},
    "int4-group-64-float": {"scheme": "int4-group", "group_size": 64, "zero_point": "float"},
    "int4-channel": {"scheme": "int4-channel"},
    **{f"codebook-{bits}": {"scheme": "codebook", "bits": bits} for bits in (4, 3, 2)},
}
# The format of as many bytes that a loss is held against, where torchao has not the same.
BASELINES = {"int4-group-64-float": "int4-group-32"}


@dataclass(frozen=True)
class Row:
    """One format on the held-out text; a quality for each segment where there is a text."""

    name: str
    plain: Quality
    rounded: Quality
    calibrated: tuple[Quality, ...]
    tuned: tuple[Quality, ...]


def segments(folder: Path, tokens: int, count: int) -> Iterator[CalibrationText]:
    """Yield `count` texts of `tokens` tokens, evenly spread over the calibration text."""
    content = (folder / "calibration.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer(folder / "tokenizer.json")
    found = tokenizer.encode(content)
    for index in range(count):
        start = (len(found) - tokens) * index // max(1, count - 1)
        piece = tokenizer.decode(found[start:])
        yield tokenize(f"segment {index}", piece, folder / "tokenizer.json", tokens, CONTEXT)


def made(model: Model, config: ExportConfig, text: CalibrationText | None = None) -> Decoder:
    """Return a model quantized as `config` says, calibrated if there is a text."""
    config = replace(config, context=CONTEXT, calibrate=None if text is None else text.name)
    return build_decoder(model, config, plan_for(config, model), calibration=text)[0]


def by_torchao(model: Model, name: str) -> Decoder:
    """Return a model whose blocks torchao has quantized, with scales and tables as fp16 numbers."""
    decoder = made(model, ExportConfig(scheme="none"))
    chosen = FORMATS[BASELINES.get(name, name)]
    if chosen["scheme"] == "codebook":
        quantizer = CodebookWeightOnlyConfig(getattr(torch, f"uint{chosen['bits']}"), [16, -1])
    else:
        size = chosen.get("group_size")
        granularity = PerGroup(size) if size else PerAxis(0)
        quantizer = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    quantize_(decoder.layers.float(), quantizer)
    for parameter in decoder.layers.parameters():
        values = getattr(parameter, "scale", getattr(parameter, "codebook", None))
        if values is not None:
            values.copy_(values.half().float())
    return decoder


def measure(
    folder: Path, formats: list[str], texts: list[CalibrationText], steps: int, limit: int
) -> tuple[Quality, list[Row]]:
    """Measure the formats; divergences are from the model with unquantized blocks."""
    model = open_model("llama" if folder == bundled_model() else folder)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    content = (folder / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(tokenizer.encode(content), CONTEXT, tokenizer.bos_id, limit)
    original = made(model, ExportConfig(scheme="none"))
    decoders = {"original": original}
    for name in formats:
        config = ExportConfig(**FORMATS[name])
        decoders[name] = by_torchao(model, name)
        decoders[f"{name} rounded"] = made(model, config)
        for text in texts:
            calibrated = made(model, config, text)
            decoders[f"{name} {text.name}"] = calibrated
            if steps:
                tuned = copy.deepcopy(calibrated)
                tune(tuned, original, text.windows, steps)
                decoders[f"{name} {text.name} tuned"] = tuned
        print(f"made {name}", flush=True)
    runners = {name: EagerRunner(decoder, "eager") for name, decoder in decoders.items()}
    found = {row.name: row for row in measure_quality(runners, windows)}
    rows = [
        Row(
            name,
            found[name],
            found[f"{name} rounded"],
            tuple(found[f"{name} {text.name}"] for text in texts),
            tuple(found[f"{name} {text.name} tuned"] for text in texts if steps),
        )
        for name in formats
    ]
    return found["original"], rows


def spread(values: list[float], form: str) -> str:
    """Return mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {deviation:{form}}"


def table(original: Quality, rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"unquantized blocks: perplexity {original.perplexity:.3f}",
        "",
        "| format | method | perplexity | recovered | mean KL | recovered |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        methods = {
            "torchao": (row.plain,),
            "rounded": (row.rounded,),
            "calibrated": row.calibrated,
            "tuned": row.tuned,
        }
        loss = row.plain.perplexity - original.perplexity
        divergence = row.plain.mean_kl or 0.0
        for method, qualities in methods.items():
            if qualities:
                perplexities = [quality.perplexity for quality in qualities]
                divergences = [quality.mean_kl or 0.0 for quality in qualities]
                won = [(row.plain.perplexity - value) / loss for value in perplexities]
                cells = (
                    row.name,
                    method,
                    spread(perplexities, ".3f"),
                    spread(won, ".0%"),
                    spread(divergences, ".4f"),
                    spread([1 - value / divergence for value in divergences], ".0%"),
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def export_all(formats: list[str], tokens: int, steps: int, limit: int) -> None:
    """Export every format as calibrated on the bundled text, and measure the file."""
    for name in formats:
        config = ExportConfig(
            **FORMATS[name],
            calibrate="bundled",
            calibration_tokens=tokens,
            tune=steps,
            context=CONTEXT,
            seq_lengths=(1, CONTEXT),
        )
        with tempfile.TemporaryDirectory() as folder:
            bundle = llm_coreml.export("llama", output=Path(folder) / "out", config=config)
            found = llm_coreml.evaluate(bundle.folder, tokens=limit, artifact_only=False)
            print(
                f"{name}: {bundle.manifest['program']['bytes']:,} bytes, perplexity "
                f"{found.artifact.perplexity:.3f}, mean KL {found.artifact.mean_kl:.4f} "
                f"({found.artifact.runtime})",
                flush=True,
            )


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, default=bundled_model(), help="as train_demo_model.py writes it"
    )
    parser.add_argument("--formats", default=",".join(FORMATS), help="separated by commas")
    parser.add_argument("--tokens", type=int, default=14_000, help="of each segment")
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--tune", type=int, default=200, help="steps; 0 leaves tuning out")
    parser.add_argument("--heldout", type=int, default=39_000, help="tokens to score")
    parser.add_argument("--artifacts", action="store_true", help="export and measure, instead")
    given = parser.parse_args()
    torch.set_num_threads(1)
    formats = given.formats.split(",")
    if given.artifacts:
        export_all(formats, given.tokens, given.tune, given.heldout)
        return
    texts = list(segments(given.model, given.tokens, given.segments))
    print(table(*measure(given.model, formats, texts, given.tune, given.heldout)), flush=True)


if __name__ == "__main__":
    main()
