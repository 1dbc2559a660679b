"""What it costs that threads spin while they wait: whole exports, beside nothing and beside work.

    python benchmarks/waiting_threads.py --repeats 3
    python benchmarks/waiting_threads.py --busy 1 --words "export llama --bits 4"

Each way of waiting is set in the environment of the command, where a user's own setting wins over
ours. The ways alternate, so that a change in the machine's load meets all of them. Busy means as
many processes that do nothing but compute. Ratios are to spinning, of the median.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

WAYS = {
    # GNU OpenMP's own default: a wait spins for a while before it sleeps.
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "sleep": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
_BUSY = "while True: pass"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes computing."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(words: list[str], way: str) -> tuple[float, float]:
    """Run the command line and return its seconds, and those of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # The others are children as well, but count only when they have ended.
        begun = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "llm_coreml.cli", *words, "-o", f"{folder}/out", "--no-cache"],
            env={**environment, **WAYS[way]},
            check=True,
            capture_output=True,
        )
        seconds = time.monotonic() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--words", default="export llama --bits 4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", default="0,1", help="Numbers of other processes.")
    parser.add_argument("--ways", default=",".join(WAYS))
    given = parser.parse_args()
    ways = given.ways.split(",")
    print(
        "| beside | way | seconds | CPU seconds | ratio | ratio of CPU |\n|---|---|---|---|---|---|"
    )
    for count in map(int, given.busy.split(",")):
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(given.repeats):
            for way in ways:
                with busy(count):
                    found[way].append(run(shlex.split(given.words), way))
        medians = {
            way: [statistics.median(values) for values in zip(*runs, strict=True)]
            for way, runs in found.items()
        }
        for way, (seconds, spent) in medians.items():
            first = medians[ways[0]]
            ratios = f"{seconds / first[0]:.2f} | {spent / first[1]:.2f}"
            print(f"| {count} | {way} | {seconds:.1f} | {spent:.1f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
