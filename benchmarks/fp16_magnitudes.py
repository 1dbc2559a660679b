"""Residual streams as large as published models have them: what fp16 makes of each, per family.

Every row takes a published `config.json`, with as few layers as show its pattern and with narrow
widths unless `--real-widths`, random weights, and what the first layer adds to the stream scaled
until the stream reaches what was measured in a published model. Then the program is made without a
shift and its numerics inspected, and it is exported twice: with `--residual-shift 0`, and as it is
by default.

    python benchmarks/fp16_magnitudes.py CONFIGS --eager       # without programs, in a minute
    python benchmarks/fp16_magnitudes.py CONFIGS
    python benchmarks/fp16_magnitudes.py CONFIGS --only gemma-3-27b-it,gpt2
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llm_coreml import ExportConfig, LlmCoreMLError, export
from llm_coreml.checkpoint.value_maps import PlusOne
from llm_coreml.checkpoint.wrappers import text_part
from llm_coreml.config import resolve
from llm_coreml.eval.inspection import Inspection, inspect_numerics
from llm_coreml.families import find_family
from llm_coreml.lower.forms import form_for
from llm_coreml.model import open_model
from llm_coreml.progress import Silent
from llm_coreml.quantize.cache import WeightCache
from llm_coreml.quantize.quantized import quantize
from llm_coreml.quantize.residual import needed_shift
from llm_coreml.verify.passes import plan_passes
from llm_coreml.verify.reading import read_text
from published_configs import shortened, write_model

REFINED = "github.com/bluorion-com/refine_massive_activations (arXiv 2503.22329)"
MEASURED = "github.com/clx1415926/Max_act_llm (arXiv 2605.15572)"
SETTINGS = ExportConfig(bits=16, context=64, seq_lengths=(1, 8))
NARROW = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}


@dataclass(frozen=True)
class Published:
    """A measured model.

    Attributes:
        name: The model.
        config: The configuration whose family and options are its.
        largest: The largest magnitude of its residual stream.
        source: Who measured it.
    """

    name: str
    config: str
    largest: float
    source: str


ROWS = (
    Published("gemma-3-27b-it", "google-gemma-3-1b-it", 696_320, MEASURED),
    Published("gemma-3-12b-pt", "google-gemma-3-1b-it", 778_240, REFINED),
    Published("gemma-3-4b-pt", "google-gemma-3-1b-it", 294_912, REFINED),
    Published("gemma-3-1b-pt", "google-gemma-3-1b-it", 95_232, REFINED),
    Published("gemma-2-27b", "google-gemma-2-2b-it", 157_696, MEASURED),
    Published("gemma-2-9b", "google-gemma-2-2b-it", 3_152, REFINED),
    Published("gemma-2b", "google-gemma-2b", 2_992, MEASURED),
    Published("Qwen3-32B", "Qwen-Qwen3-0.6B", 35_328, MEASURED),
    Published("Qwen3-1.7B", "Qwen-Qwen3-0.6B", 14_208, MEASURED),
    Published("Qwen2.5-32B", "Qwen-Qwen2.5-0.5B-Instruct", 30_848, MEASURED),
    Published("Qwen2.5-1.5B", "Qwen-Qwen2.5-0.5B-Instruct", 7_968, MEASURED),
    Published("Llama-2-7b-hf", "meta-llama-Llama-3.2-1B-Instruct", 2_848, REFINED),
    Published("Llama-3.2-3B", "meta-llama-Llama-3.2-1B-Instruct", 564, REFINED),
    Published("Mistral-7B-v0.3", "mistralai-Mistral-7B-Instruct-v0.3", 354, REFINED),
    Published("phi-2", "microsoft-phi-1", 1_272, REFINED),
    Published("gpt2", "openai-community-gpt2", 3_072, REFINED),
)


def narrowed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of the same options with few and narrow matrices."""
    heads = config.get("num_attention_heads", config.get("n_head", 1))
    size = config.get("head_dim") or config.get("hidden_size", config.get("n_embd", 0)) // heads
    count = max(1, NARROW["hidden_size"] // size)
    shared = config.get("num_key_value_heads", heads)
    found = {**config, **{key: value for key, value in NARROW.items() if key in config}}
    found |= {key: count for key in ("num_attention_heads", "n_head") if key in config}
    if "num_key_value_heads" in config:
        found["num_key_value_heads"] = count if shared == heads else 1
    if "head_dim" not in config and "n_embd" not in config:
        found["hidden_size"] = count * size
    if "n_embd" in config:
        found["n_embd"] = count * size
    # Special tokens are those of the whole vocabulary.
    return {key: value for key, value in found.items() if not key.endswith("_token_id")}


def concentrate(folder: Path) -> None:
    """Have one channel be most of what the first layer's feed-forward part gives.

    A norm behind it hands on no more than the root of the width, and that of one channel alone.
    """
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0] *= 100
    save_file(tensors, folder / "model.safetensors")


def scale(folder: Path, factor: float) -> None:
    """Make what the first layer's feed-forward part adds to the stream `factor` times as large."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = find_family(config)
    made = family.stored(family.spec(config))
    normed = "layers.0.mlp_out_norm.weight"
    stored = made[normed if normed in made else "layers.0.mlp.down_proj.weight"]
    tensors = load_file(folder / "model.safetensors")
    less = 1 if isinstance(stored.values, PlusOne) else 0
    for name in stored.names:
        values = (tensors[name].float() + less) * factor - less
        tensors[name] = values.to(torch.float32)
    save_file(tensors, folder / "model.safetensors")


def unshifted(folder: Path, program: Path | None = None) -> tuple[float, float]:
    """Read a text in fp32 and in plain fp16, and write the program without a shift.

    Returns:
        The largest number of the stream, and the error of plain fp16 over the largest logit, which
        is no number where it overflows.
    """
    model = open_model(folder)
    job = resolve(SETTINGS.under({"residual_shift": 0}), model.spec)
    with tempfile.TemporaryDirectory() as kept:
        quantized = quantize(model, job, folder / "none", Silent(), WeightCache(Path(kept), print))
        form = form_for(job, model.spec, None, ())
        told = form.description
        plan = plan_passes(told.seq_lengths, told.context)
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.spec.vocab_size, (plan.tokens,), generator=draw).tolist()
        read = read_text(
            quantized.decoder,
            tokens,
            "random tokens",
            plan,
            every_row=told.every_row,
            natural=True,
            in_fp16=True,
        )
        if program is not None:
            form.write(quantized.decoder, program, lambda _: None)
    return read.largest, math.nan if read.plain_fp16 is None else read.plain_fp16.max_relative_error


def exported(folder: Path, output: Path, shift: int | None) -> str:
    """Export, and return the error that was found, or why it was refused."""
    config = SETTINGS if shift is None else SETTINGS.under({"residual_shift": shift})
    try:
        bundle = export(folder, output=output, config=config, cache=False)
    except LlmCoreMLError as error:
        return f"refused ({type(error).__name__})"
    words = bundle.manifest.rebuild
    found = words[words.index("--residual-shift") + 1] if "--residual-shift" in words else "0"
    error = bundle.manifest.verification.max_relative_error
    return f"verified, shift {found}, error {error:.1e}"


def inspected(program: Path, folder: Path) -> Inspection:
    """Return the numerics of a program on random tokens."""
    ids = folder / "ids.txt"
    draw = torch.Generator().manual_seed(1)
    ids.write_text(" ".join(map(str, torch.randint(512, (32,), generator=draw).tolist())))
    return inspect_numerics(program, ids=ids, tokens=32, against=None)


def summary(found: Inspection) -> str:
    """Return where fp16 overflows, or how near it comes to that."""
    if found.overflows:
        first = found.overflows[0]
        return f"{len(found.overflows)} operations overflow, first a `{first.type}`"
    return f"largest {found.nearest[0].largest:,.0f}"


def measure(row: Published, configs: Path, real: bool, eager: bool) -> dict[str, Any]:
    """Return what is found of one published magnitude, without its program if `eager`."""
    config = json.loads((configs / f"{row.config}.json").read_text(encoding="utf-8"))
    small = shortened(text_part(config).config)
    small = small if real else narrowed(small)
    with tempfile.TemporaryDirectory() as place:
        folder, program = Path(place) / "model", Path(place) / "model.pte"
        folder.mkdir()
        write_model(small, folder)
        if row.largest > 65504:
            concentrate(folder)
        scale(folder, 1e4)
        scale(folder, row.largest / unshifted(folder)[0])
        reached, half = unshifted(folder)
        found = {
            "model": row.name,
            "family": small["model_type"],
            "published": row.largest,
            "source": row.source,
            "reached": reached,
            "half": half,
            "shift": needed_shift(reached),
        }
        if eager:
            return found
        bundle = Path(place) / "out"
        without = exported(folder, bundle, 0)
        if not bundle.exists():  # which needs its program all the same
            unshifted(folder, program)
        plain = summary(inspected(program if program.exists() else bundle, Path(place)))
        default, after = without, plain
        if needed_shift(reached):
            shutil.rmtree(bundle, ignore_errors=True)
            default = exported(folder, bundle, None)
            after = summary(inspected(bundle, Path(place))) if bundle.exists() else "-"
    return {**found, "unshifted": plain, "without": without, "default": default, "after": after}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the rows as Markdown."""
    programs = "without" in rows[0]
    yield (
        "| model | family | published | here | plain fp16, eager | halvings needed |"
        + " program without a shift | `--residual-shift 0` | by default | then |" * programs
    )
    yield "|---|---|--:|--:|--:|--:|" + "---|---|---|---|" * programs
    for row in rows:
        half = f"{row['half']:.1e}" if math.isfinite(row["half"]) else "inf or NaN"
        cells = [row[key] for key in ("unshifted", "without", "default", "after") if programs]
        yield (
            f"| {row['model']} | `{row['family']}` | {row['published']:,.0f} | "
            f"{row['reached']:,.0f} | {half} | {row['shift']} |"
            + "".join(f" {cell} |" for cell in cells)
        )


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", type=Path, help="folder of config.json files, each NAME.json")
    parser.add_argument("--only", help="models, by commas")
    parser.add_argument("--eager", action="store_true", help="make no programs")
    parser.add_argument("--real-widths", action="store_true", help="those of the configuration")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = None if given.only is None else set(given.only.split(","))
    rows = []
    for row in (each for each in ROWS if names is None or each.name in names):
        rows.append(measure(row, given.configs, given.real_widths, given.eager))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
