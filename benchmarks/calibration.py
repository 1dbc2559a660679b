"""What calibration wins back of what rounding to nearest loses, on the bundled model.

Each format is made once by rounding to nearest and once for every segment of the calibration text,
at the same bytes, and read on the held-out text in PyTorch. "recovered" is the share of the loss
that calibration undoes: of the divergence from the unquantized blocks, and of the perplexity.
With --artifacts every calibrated format is also exported, which verifies the file.

    python benchmarks/calibration.py --formats int4-group-32,codebook-3 --tokens 7000
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.results import Quality
from llm_coreml.eval.text import cut, read_text
from llm_coreml.recipes import bundled_model

import llm_coreml
from llm_coreml.build import Model, build_decoder, open_model
from llm_coreml.config import ExportConfig
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.text import BUNDLED_TEXT, CalibrationText, read_content, tokenize
from llm_coreml.runtime import EagerRunner, Runner
from llm_coreml.tokenizer import Tokenizer

TOKENIZER = bundled_model() / "tokenizer.json"
FORMATS = {
    **{f"int4-group-{n}": {"scheme": "int4-group", "group_size": n} for n in (16, 32, 64)},
    "int4-channel": {"scheme": "int4-channel"},
    **{f"codebook-{bits}": {"scheme": "codebook", "bits": bits} for bits in (4, 3, 2)},
}


@dataclass(frozen=True)
class Row:
    """One format on the held-out text: rounded to nearest, and calibrated on each segment."""

    name: str
    rounded: Quality
    calibrated: tuple[Quality, ...]


def segments(tokens: int, count: int) -> Iterator[CalibrationText]:
    """Yield `count` texts of `tokens` tokens, evenly spread over the calibration text."""
    content = read_content(BUNDLED_TEXT)
    tokenizer = Tokenizer(TOKENIZER)
    found = tokenizer.encode(content)
    for index in range(count):
        start = (len(found) - tokens) * index // max(1, count - 1)
        piece = tokenizer.decode(found[start:])
        yield tokenize(f"segment {index}", piece, TOKENIZER, tokens, context=1024)


def decoder_runner(model: Model, config: ExportConfig, text: CalibrationText | None) -> Runner:
    """Return a model that is quantized as `config` says, calibrated if there is a text."""
    config = replace(config, calibrate=None if text is None else text.name)
    plan = make_plan(config, model.spec)
    return EagerRunner(build_decoder(model, config, plan, calibration=text)[0], "eager")


def measure(
    formats: list[str], texts: list[CalibrationText], limit: int
) -> tuple[Quality, list[Row]]:
    """Measure the formats; divergences are from the model with unquantized blocks."""
    model = open_model("llama")
    tokenizer = Tokenizer(TOKENIZER)
    windows = cut(tokenizer.encode(read_text(None)[1]), 1024, tokenizer.bos_id, limit)
    runners = {"original": decoder_runner(model, ExportConfig(scheme="none"), None)}
    for name in formats:
        config = ExportConfig(**FORMATS[name])
        runners[name] = decoder_runner(model, config, None)
        for text in texts:
            runners[f"{name} {text.name}"] = decoder_runner(model, config, text)
    found = {row.name: row for row in measure_quality(runners, windows)}
    rows = [
        Row(name, found[name], tuple(found[f"{name} {text.name}"] for text in texts))
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
        "| format | rounded: ppl | KL | calibrated: ppl | KL | ppl recovered | KL recovered |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        loss = row.rounded.perplexity - original.perplexity
        divergence = row.rounded.mean_kl or 0.0
        perplexities = [quality.perplexity for quality in row.calibrated]
        divergences = [quality.mean_kl or 0.0 for quality in row.calibrated]
        cells = (
            row.name,
            f"{row.rounded.perplexity:.3f}",
            f"{divergence:.4f}",
            spread(perplexities, ".3f"),
            spread(divergences, ".4f"),
            spread([(row.rounded.perplexity - value) / loss for value in perplexities], ".0%"),
            spread([1 - value / divergence for value in divergences], ".0%"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def export_all(formats: list[str], tokens: int) -> None:
    """Export every format, calibrated, and say what verification found."""
    for name in formats:
        config = ExportConfig(
            **FORMATS[name], calibrate="bundled", calibration_tokens=tokens, seq_lengths=(1, 64)
        )
        with tempfile.TemporaryDirectory() as folder:
            bundle = llm_coreml.export("llama", output=Path(folder) / "out", config=config)
            checked = bundle.manifest["verification"]
            print(
                f"{name}: {bundle.manifest['program']['bytes']:,} bytes, "
                f"{checked['conversion']['weights']} weights bit by bit, mean KL "
                f"{checked['mean_kl']:.1e} ({checked['runtime']})",
                flush=True,
            )


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="separated by commas")
    parser.add_argument("--tokens", type=int, default=7000, help="of each segment")
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=39_098, help="tokens to score")
    parser.add_argument("--artifacts", action="store_true", help="export each format, too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    formats = given.formats.split(",")
    texts = list(segments(given.tokens, given.segments))
    print(table(*measure(formats, texts, given.heldout)), flush=True)
    if given.artifacts:
        export_all(formats, given.tokens)


if __name__ == "__main__":
    main()
