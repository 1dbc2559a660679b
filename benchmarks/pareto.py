"""What every format and method loses for its bits, on the bundled model, as a table and a plot.

Bits per weight are those stored for the linear layers of the blocks, scales and tables included.
Every format is rounded by torchao where that has it, rounded by this package, and, where that is
possible, calibrated, and calibrated and tuned; and read in PyTorch on held-out text. Divergences
are from the model with unquantized blocks. Points that none beats are marked. Rows are kept in a
file as they are found, from which a stopped run goes on.

    python benchmarks/pareto.py --rows pareto.json --plot docs/pareto.svg
    python benchmarks/pareto.py --rows pareto.json --plot docs/pareto.svg --drawn
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from calibration_quality import CONTEXT, by_torchao, unquantized
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.eval.heldout import cut, read_text
from llm_coreml.eval.quality import measure_quality
from llm_coreml.model import Model, open_model
from llm_coreml.quantize import QuantizationPlan, make_plan
from llm_coreml.quantize.calibrate.text import BUNDLED_TEXT, CalibrationText, read_content, tokenize
from llm_coreml.quantize.calibrate.tune import tune
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Scheme
from llm_coreml.quantize.plan.budget import mixed_options
from llm_coreml.quantize.plan.flags import linear_scheme
from llm_coreml.quantize.plan.sensitivity import sensitivities
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.tokenizer import Tokenizer
from mixed_bits import mean_bits, mixed
from mixed_bits import windows as choosing_windows

TOKENIZER = bundled_model() / "tokenizer.json"
METHODS = ("torchao", "rounded", "calibrated", "tuned")
MIXED = (2.5, 3.0, 3.5, 4.0, 5.0)
SETTINGS: tuple[dict[str, object], ...] = (
    *({"scheme": f"int{b}-group", "group_size": n} for b in (2, 3, 4, 6, 8) for n in (32, 64)),
    *({"scheme": f"int{b}-group", "zero_point": "int"} for b in (2, 3, 4)),
    *({"scheme": f"int{b}-group", "group_size": 64, "zero_point": "float"} for b in (2, 3, 4)),
    *({"scheme": f"int{b}-channel"} for b in (4, 8)),
    *({"scheme": f"int{b}-channel", "zero_point": "int"} for b in (4, 8)),
    *({"scheme": "codebook", "bits": b} for b in (2, 3, 4, 6, 8)),
    *({"scheme": "codebook", "bits": b, "codebook_rows": 1} for b in (2, 3, 4)),
    *({"scheme": "codebook", "bits": b, "codebook_columns": 64} for b in (2, 3, 4)),
    {"scheme": "codebook", "bits": 4, "codebook_vector": 2},
    *(
        {"scheme": "codebook", "bits": b, "codebook_vector": 2, "codebook_columns": 64}
        for b in (6, 8)
    ),
    {"scheme": "mxfp4"},
)
TUNED = ("int4 group 32", "int3 group 32", "mixed 3.5", *(f"codebook {b} bit" for b in (2, 3, 4)))


@dataclass(frozen=True)
class Point:
    """One format by one method."""

    name: str
    family: str
    method: str
    bits: float
    perplexity: float
    kl: float


@dataclass(frozen=True)
class Format:
    """What to measure: a plan, and the one scheme that it has, if it is uniform."""

    name: str
    family: str
    config: ExportConfig
    plan: QuantizationPlan
    scheme: Scheme | None


def family(scheme: Scheme) -> str:
    """Return the kind of format, for the plot."""
    if isinstance(scheme, (IntGroup, IntChannel)):
        kind = "group" if isinstance(scheme, IntGroup) else "channel"
        return f"int per {kind}" if scheme.zero_point == "none" else "int with zero point"
    if isinstance(scheme, Codebook):
        return "codebook" if scheme.vector == 1 else "codebook of pairs"
    return scheme.name


def formats(model: Model) -> Iterator[Format]:
    """Yield every format by its name."""
    for settings in SETTINGS:
        config = ExportConfig(**settings, minimum_os="iOS26")  # type: ignore[arg-type]
        job = resolve(config, model.spec)
        scheme = linear_scheme(job)
        name = scheme.label.replace(", 16 rows per table", "").replace(" per table", " a table")
        yield Format(name, family(scheme), config, make_plan(job, model.spec), scheme)
    config = ExportConfig(bits=3.5)
    options = mixed_options(resolve(config, model.spec), model.spec)
    losses = sensitivities(model.weights, model.spec, choosing_windows(), options)
    for bits in MIXED:
        yield Format(f"mixed {bits:g}", "mixed", config, mixed(model, losses, bits), None)


def in_torchao(scheme: Scheme) -> bool:
    """Return whether torchao has the format; many or large tables of its are left out as slow."""
    if isinstance(scheme, Codebook):
        return scheme.vector == 1 and scheme.bits < 8 and scheme.rows != 1
    return isinstance(scheme, (IntGroup, IntChannel)) and scheme.zero_point != "float"


def methods(wanted: Format, steps: int) -> list[str]:
    """Return by which methods a format can be made."""
    scheme = wanted.scheme
    found = ["torchao"] if scheme is not None and in_torchao(scheme) else []
    found.append("rounded")
    if scheme is None or scheme.calibrated:
        found += ["calibrated", *(["tuned"] if steps and wanted.name in TUNED else [])]
    return found


def made(model: Model, wanted: Format, method: str, text: CalibrationText, steps: int) -> Decoder:
    """Return the model in a format."""
    if method == "torchao":
        assert wanted.scheme is not None
        return by_torchao(model, wanted.scheme)
    calibration = None if method == "rounded" else text
    name = None if calibration is None else calibration.name
    config = replace(wanted.config, context=CONTEXT, calibrate=name)
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, wanted.plan, calibration=calibration)
    # Zero points are for the token table too; here blocks are compared.
    same = unquantized(model)
    decoder.embed_tokens, decoder.lm_head = same.embed_tokens, same.lm_head
    if method == "tuned":
        tune(decoder, unquantized(model), text.windows, steps)
    return decoder


def measure(text: CalibrationText, steps: int, limit: int, known: list[Point]) -> Iterator[Point]:
    """Yield a point for every format and method that is not known."""
    model = open_model("llama")
    tokenizer = Tokenizer(TOKENIZER)
    windows = cut(tokenizer.encode(read_text(None)[1]), CONTEXT, tokenizer.beginning, limit)
    original = unquantized(model)
    done = {(point.name, point.method) for point in known}
    for wanted in formats(model):
        bits = mean_bits(model, wanted.plan)
        decoders = {
            method: made(model, wanted, method, text, steps)
            for method in methods(wanted, steps)
            if (wanted.name, method) not in done
        }
        if decoders:
            decoders = {"original": original, **decoders}
            runners = {name: EagerRunner(decoder, "eager") for name, decoder in decoders.items()}
            for row in measure_quality(runners, windows):
                kl = row.mean_kl or 0.0
                yield Point(wanted.name, wanted.family, row.name, bits, row.perplexity, kl)


def front(points: list[Point], value: Callable[[Point], float]) -> list[Point]:
    """Return the points for which no other is as small and as good, by rising bits."""
    best, found = math.inf, []
    for point in sorted(points, key=lambda point: (point.bits, value(point))):
        if value(point) < best:
            best = value(point)
            found.append(point)
    return found


def table(points: list[Point]) -> str:
    """Return one line for every format as Markdown; stars mark what is on a front."""
    stars = front(points, by_kl), front(points, by_perplexity)
    lines = [
        f"| format | bits | {' | '.join(f'{method}: ppl | KL' for method in METHODS)} |",
        "|---|--:" + "|--:|--:" * len(METHODS) + "|",
    ]
    order = sorted({(point.bits, point.name) for point in points})
    for bits, name in order:
        cells = [name, f"{bits:.2f}"]
        for method in METHODS:
            found = [p for p in points if (p.name, p.method) == (name, method)]
            cells += [starred(p, f"{p.perplexity:.2f}", stars[1]) for p in found] or [""]
            cells += [starred(p, f"{p.kl:.5f}", stars[0]) for p in found] or [""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def starred(point: Point, text: str, best: list[Point]) -> str:
    """Return the text in bold if the point is one of the best."""
    return f"**{text}**" if point in best else text


def by_kl(point: Point) -> float:
    """Return what is to be small."""
    return point.kl


def by_perplexity(point: Point) -> float:
    """Return what is to be small."""
    return point.perplexity


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=Path, required=True, help="file to keep, and to go on from")
    parser.add_argument("--plot", type=Path, help="picture to draw: .svg or .png")
    parser.add_argument("--drawn", action="store_true", help="only draw what is there")
    parser.add_argument("--tokens", type=int, default=16_000, help="to calibrate on")
    parser.add_argument("--tune", type=int, default=150, help="steps")
    parser.add_argument("--heldout", type=int, default=8_192, help="tokens to score")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(given.rows.read_text()) if given.rows.is_file() else []
    points = [Point(**row) for row in rows]

    if not given.drawn:
        text = tokenize(BUNDLED_TEXT, read_content(BUNDLED_TEXT), TOKENIZER, given.tokens, CONTEXT)
        for point in measure(text, given.tune, given.heldout, list(points)):
            points.append(point)
            print(point, flush=True)
            given.rows.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    base = next(point for point in points if point.method == "original")
    points = [point for point in points if point.method != "original"]
    print(f"unquantized blocks: perplexity {base.perplexity:.3f}\n\n{table(points)}")
    if given.plot is not None:
        from pareto_plot import draw

        draw(points, base.perplexity, given.plot)


if __name__ == "__main__":
    main()
