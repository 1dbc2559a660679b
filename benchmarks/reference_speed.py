"""Speed and memory of the reference runtime against transformers on the same weights.

Ours is the `.pte` of a 4-bit export, run by the reference runtime; the peer is the original, run by
`transformers` with eager attention, fp32 weights and its own KV cache. Either runs in a process of
its own, which loads the model, reads a prompt of 512 tokens and then decodes token by token; the
two take turns, so that a change in the machine's load meets both.

    python benchmarks/reference_speed.py --repeats 5
    python benchmarks/reference_speed.py --models bundled --mode fp32 --format json

The models are the bundled one and one of four layers with the widths and the vocabulary of
Llama-3.2-1B and random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.

_ROOT = Path(__file__).resolve().parent.parent
_PROMPT, _DECODED, _ROUNDS = 512, 64, 5
_FIGURES = ("load_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_mb")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        children: dict[str, Callable[..., dict[str, float]]] = {"ours": run_ours, "peer": run_peer}
        print(json.dumps(children[sys.argv[2]](*sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="bundled,1b-widths", help="which, with commas (both)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (3)")
    parser.add_argument("--mode", default="declared", help="numerics of ours (declared)")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="reference-speed-") as name:
        for model in options.models.split(","):
            original, program = prepare(model, Path(name))
            pairs = []
            for _ in range(options.repeats):
                ours = measure("ours", str(program), options.mode)
                pairs.append((ours, measure("peer", str(original))))
            found[model] = summary(pairs)
    if options.format == "json":
        print(json.dumps({"mode": options.mode, "models": found}))
    else:
        print_table(found)


def prepare(model: str, folder: Path) -> tuple[Path, Path]:
    """Return the original's folder and the exported program."""
    if model == "bundled":
        original, arguments = _ROOT / "llm_coreml" / "demo", ["llama"]
    else:
        original = folder / "hf"
        script = str(_ROOT / "benchmarks" / "random_llama.py")
        _call([sys.executable, script, str(folder), "1b", "4", "hf"])
        arguments = [str(original)]
    output = folder / model
    command = [sys.executable, "-m", "llm_coreml.cli", "export", *arguments]
    _call([*command, "--bits", "4", "--context", "1024", "-o", str(output)])
    return original, output / "model.pte"


def measure(side: str, *arguments: str) -> dict[str, float]:
    """Run one side in a new process and return its figures."""
    figures: dict[str, float] = json.loads(
        _call([sys.executable, __file__, "--child", side, *arguments]).splitlines()[-1]
    )
    print(f"{side}: {figures}", file=sys.stderr)
    return figures


def _call(command: list[str]) -> str:
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        raise SystemExit(f"{done.stderr[-3000:]}\n{' '.join(command)} failed.")
    return done.stdout


def run_ours(program: str, mode: str) -> dict[str, float]:
    """Load the program, read the prompt and decode."""
    import torch

    from llm_coreml.reference import Execution, load_method

    started = time.perf_counter()
    forward = load_method(program, execution=Execution(mode=mode))
    loaded = time.perf_counter() - started
    vocabulary = int(forward.constants["get_vocab_size"])  # type: ignore[arg-type]
    tokens = _tokens(vocabulary)

    def prefill() -> None:
        forward.reset()
        forward(tokens, torch.tensor([0]))

    def decode(number: int) -> None:
        forward(tokens[:, number : number + 1], torch.tensor([_PROMPT + number]))

    return _timed(prefill, decode, loaded)


def run_peer(folder: str) -> dict[str, float]:
    """Load the original, read the prompt and decode."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    loaded = time.perf_counter() - started
    tokens = _tokens(model.config.vocab_size)
    cache = DynamicCache(config=model.config)

    def prefill() -> None:
        nonlocal cache
        cache = DynamicCache(config=model.config)
        # The program returns the last row of logits; so does the peer.
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def decode(number: int) -> None:
        model(tokens[:, number : number + 1], past_key_values=cache, use_cache=True)

    with torch.inference_mode():
        return _timed(prefill, decode, loaded)


def _tokens(vocabulary: int) -> Any:
    import torch

    return torch.randint(0, vocabulary, (1, _PROMPT), generator=torch.Generator().manual_seed(0))


def _timed(
    prefill: Callable[[], None], decode: Callable[[int], None], loaded: float
) -> dict[str, float]:
    """Time both parts; the first round, which also prepares plans and kernels, is not counted."""
    prefills, decodes = [], []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        prefill()
        prefills.append(time.perf_counter() - start)
        for number in range(_DECODED):
            start = time.perf_counter()
            decode(number)
            decodes.append(time.perf_counter() - start)
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {
        "load_s": loaded,
        "prefill_tokens_per_s": _PROMPT / statistics.median(prefills[1:]),
        "decode_tokens_per_s": 1 / statistics.median(decodes[_DECODED:]),
        "peak_mb": peak / 1e6,
    }


def summary(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Return the medians of both sides, and the median of the paired ratios."""
    return {
        "ours": {key: statistics.median(ours[key] for ours, _ in pairs) for key in _FIGURES},
        "peer": {key: statistics.median(peer[key] for _, peer in pairs) for key in _FIGURES},
        "ratio": {
            key: statistics.median(ours[key] / peer[key] for ours, peer in pairs)
            for key in _FIGURES
        },
    }


def print_table(found: dict[str, Any]) -> None:
    print("| model | side | load s | prefill tokens/s | decode tokens/s | peak MB |")
    print("|---|---|--:|--:|--:|--:|")
    for model, sides in found.items():
        for side, figures in sides.items():
            digits = 2 if side == "ratio" else 1
            cells = " | ".join(f"{figures[key]:.{digits}f}" for key in _FIGURES)
            print(f"| {model} | {side} | {cells} |")


if __name__ == "__main__":
    main()
