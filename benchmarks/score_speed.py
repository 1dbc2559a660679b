"""How fast exports are scored, whose calls give the last row or all of them, beside transformers.

    python benchmarks/score_speed.py FOLDER --last OUT --all OUT --tokens 32768

The bundles are exports of the checkpoint in FOLDER. Each reads the same windows and makes the same
figures of its logits; transformers reads them in fp32. CPU seconds are of the process, so that a
machine that others share does not change them much.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.eval.heldout import HeldOut, read_heldout
from llm_coreml.eval.token_scores import score
from llm_coreml.eval.whole_rows import whole_rows

COLUMNS = (
    "load and proof, CPU s",
    "reading, CPU s",
    "figures, CPU s",
    "all, s",
    "tokens/CPU s",
    "perplexity",
)
Logits = Callable[[list[int]], torch.Tensor]


def timed(name: str, make: Callable[[], Logits], read: HeldOut) -> float:
    """Print what reading took, and return the CPU seconds of a thousand tokens."""
    begun, seconds = time.process_time(), time.perf_counter()
    logits = make()
    ready = time.process_time()
    cost = 0.0
    scoring = 0.0
    for window in read.windows:
        rows = logits(list(window[:-1]))
        start = time.process_time()
        cost += float(score(rows, torch.tensor(window[1:]))["nll"].sum())
        scoring += time.process_time() - start
    cpu, wall = time.process_time() - ready, time.perf_counter() - seconds
    print(
        f"| {name} | {ready - begun:.1f} | {cpu - scoring:.1f} | {scoring:.1f} | {wall:.0f} "
        f"| {read.tokens / (cpu - scoring):.0f} | {math.exp(cost / read.tokens):.4f} |",
        flush=True,
    )
    return 1000 * (cpu - scoring) / read.tokens


def transformers_logits(folder: Path) -> Logits:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            rows: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
        return rows

    return logits


def bundle_logits(folder: Path, window: tuple[int, ...]) -> Logits:
    return whole_rows(open_runner(open_bundle(folder)), window, print).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--last", type=Path, required=True)
    parser.add_argument("--all", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=32768)
    given = parser.parse_args()
    bundle = open_bundle(given.last)
    read = read_heldout(given.text, bundle.tokenizer, bundle.manifest.program.context, given.tokens)
    print(
        f"{read.tokens} tokens in {len(read.windows)} windows, {torch.get_num_threads()} threads\n"
    )
    print(
        "| model | load and proof, CPU s | reading, CPU s | figures, CPU s | all, s | tokens/CPU s"
    )
    print("| perplexity |\n|---|--:|--:|--:|--:|--:|--:|")
    peer = timed("transformers fp32", lambda: transformers_logits(given.folder), read)
    for name, folder in (("last", given.last), ("all", given.all)):
        make = lambda folder=folder: bundle_logits(folder, read.windows[0])  # noqa: E731
        ours = timed(f"logits {name}", make, read)
        print(f"\nlogits {name}: {peer / ours:.2f}x transformers\n", flush=True)


if __name__ == "__main__":
    main()
