"""What calibration and tuning win back of what plain rounding loses, on a small model.

Every format is made by torchao, by this package without data, and, for each of several segments of
the calibration text, calibrated, and calibrated and tuned; all at the same bytes. They are read in
PyTorch on held-out text. "recovered" is the share of the loss of torchao's rounding that is undone:
of the perplexity, and of the divergence from the unquantized blocks. With --artifacts every format
is also exported as it was calibrated on the bundled text, and the file is measured instead.

    python benchmarks/calibration_quality.py --formats int4-group-32 --tokens 14000 --tune 200
    python scripts/demo/train_demo_model.py --output other --seed 1 --steps 200 --decay-steps 60
    python benchmarks/calibration_quality.py --model other
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torchao.prototype.quantization.codebook_coreml import CodebookWeightOnlyConfig
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

import llm_coreml
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.eval.heldout import cut
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.results import Quality
from llm_coreml.model import Model, open_model
from llm_coreml.quantize.calibrate.text import CalibrationText, tokenize
from llm_coreml.quantize.calibrate.tune import tune
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Scheme
from llm_coreml.quantize.plan.choose import plan_for
from llm_coreml.quantize.plan.flags import linear_scheme
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner
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
    starts = [(len(found) - tokens) * index // max(1, count - 1) for index in range(count)]
    apart = all(after - before >= tokens for before, after in pairwise(starts))
    relation = "nothing in common" if apart else "parts in common"
    print(f"{count} segments of {tokens:,} of {len(found):,} tokens, with {relation}", flush=True)
    for index, start in enumerate(starts):
        piece = tokenizer.decode(found[start:])
        yield tokenize(f"segment {index}", piece, folder / "tokenizer.json", tokens, CONTEXT)


def made(model: Model, config: ExportConfig, text: CalibrationText | None = None) -> Decoder:
    """Return a model quantized as `config` says, calibrated if there is a text."""
    config = replace(config, context=CONTEXT, calibrate=None if text is None else text.name)
    job = resolve(config, model.spec)
    return build_decoder(model, job, plan_for(job, model), calibration=text)


def unquantized(model: Model) -> Decoder:
    """Return a model whose blocks are as they were, and whose token table is quantized."""
    return made(model, ExportConfig(scheme="none"))


def by_torchao(model: Model, scheme: Scheme) -> Decoder:
    """Return a model whose blocks torchao has quantized, with scales and tables as fp16 numbers."""
    decoder = unquantized(model)
    if isinstance(scheme, Codebook):
        block = [scheme.rows or -1, scheme.columns or -1]
        quantizer = CodebookWeightOnlyConfig(getattr(torch, f"uint{scheme.bits}"), block)
    else:
        assert isinstance(scheme, (IntGroup, IntChannel))
        symmetric = scheme.zero_point == "none"
        quantizer = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{scheme.bits}"),
            granularity=PerGroup(scheme.group_size) if isinstance(scheme, IntGroup) else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        )
    quantize_(decoder.layers.float(), quantizer)
    for parameter in decoder.layers.parameters():
        values = getattr(parameter, "scale", getattr(parameter, "codebook", None))
        if values is not None:
            values.copy_(values.half().float())
    return decoder


def measure(
    folder: Path, formats: list[str], texts: list[CalibrationText], steps: int, limit: int
) -> Iterator[tuple[Quality, Row]]:
    """Yield what is measured of each format, and beside it of the model with unquantized blocks."""
    model = open_model("llama" if folder == bundled_model() else folder)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    content = (folder / "heldout.txt").read_text(encoding="utf-8")
    windows = cut(tokenizer.encode(content), CONTEXT, tokenizer.beginning, limit)
    original = unquantized(model)

    def read(name: str, decoders: dict[str, Decoder]) -> list[Quality]:
        decoders = {"original": original, **decoders}
        runners = {label: EagerRunner(decoder, "eager") for label, decoder in decoders.items()}
        found = measure_quality(runners, windows)
        figures = (f"{row.name} {row.perplexity:.3f} ({row.mean_kl or 0:.5f})" for row in found)
        print(f"{name}: {', '.join(figures)}", flush=True)
        return list(found)

    for name in formats:
        config = ExportConfig(**FORMATS[name])
        like = linear_scheme(
            resolve(ExportConfig(**FORMATS[BASELINES.get(name, name)]), model.spec)
        )
        plainly = {"torchao": by_torchao(model, like), "rounded": made(model, config)}
        before, plain, rounded = read(name, plainly)
        calibrated, tuned = [], []
        for text in texts:
            decoders = {"calibrated": made(model, config, text)}
            if steps:
                decoders["tuned"] = copy.deepcopy(decoders["calibrated"])
                tune(decoders["tuned"], original, text.windows, steps)
            found = read(f"{name}, {text.name}", decoders)[1:]
            calibrated.append(found[0])
            tuned += found[1:]
        yield before, Row(name, plain, rounded, tuple(calibrated), tuple(tuned))


def spread(values: list[float], form: str) -> str:
    """Return mean and standard deviation, if there are several."""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):{form}}"


def lines(original: Quality, row: Row) -> Iterator[str]:
    """Yield the lines of a row as Markdown."""
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
            yield f"| {' | '.join(cells)} |"


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
                f"{name}: {bundle.manifest.program.bytes:,} bytes, perplexity "
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
    found = list(measure(given.model, formats, texts, given.tune, given.heldout))
    print(f"\nunquantized blocks: perplexity {found[0][0].perplexity:.3f}\n")
    print("| format | method | perplexity | recovered | mean KL | recovered |")
    print("|---|---|--:|--:|--:|--:|")
    for original, row in found:
        print("\n".join(lines(original, row)))


if __name__ == "__main__":
    main()
