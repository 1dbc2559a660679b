"""Time and memory of an export in partitions against one partition, in one run.

The model has the widths of Llama-3.2-1B or Llama-3.1-8B, random weights and as many layers as asked
for. Every export runs in a process of its own and is verified; the cases alternate, so that a
change in the machine's load meets all of them. Weights are quantized anew each time.

    python benchmarks/partitions.py --model 1b --layers 2 --repeats 2
    python benchmarks/partitions.py --model 8b --layers 32 --partition-size 950MB
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.

_MAKER = Path(__file__).with_name("random_llama.py")
# One partition, whatever the weights take, is what a budget beyond them gives.
_ONE = "1TB"
_FIGURES = ("seconds", "cpu_seconds", "peak_bytes", "lowering_peak_bytes", "file_bytes")


def main() -> None:
    """Measure, and print a table as Markdown."""
    if sys.argv[1:2] == ["--child"]:
        _export(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("1b", "8b"), default="1b", help="its widths (1b)")
    parser.add_argument("--layers", type=int, default=2, help="layers (2)")
    parser.add_argument("--context", type=int, default=256, help="positions of the cache (256)")
    parser.add_argument("--partition-size", default="300MB", help="bytes of weights (300MB)")
    parser.add_argument("--repeats", type=int, default=1, help="exports per case (1)")
    parser.add_argument("--folder", help="where to write the model and the exports (temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="partitions-", dir=options.folder) as name:
        made = [sys.executable, str(_MAKER), name, options.model, str(options.layers), "hf"]
        subprocess.run(made, check=True)
        cases = {"one partition": _ONE, options.partition_size: options.partition_size}
        found: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
        for _ in range(options.repeats):
            for case, size in cases.items():
                found[case].append(_measured(Path(name), size, options.context))
                print(f"{case}: {found[case][-1]['seconds']:.0f} s", file=sys.stderr)
    print("| partitions | s | CPU s | peak MB | peak MB of lowering | file MB | holds |")
    print("|---|---|---|---|---|---|---|")
    for case, runs in found.items():
        print(_row(case, runs))


def _measured(folder: Path, size: str, context: int) -> dict[str, Any]:
    """Export once in a process of its own, and return what that took."""
    begun, before = time.perf_counter(), os.times()
    words = [sys.executable, __file__, "--child", str(folder), size, str(context)]
    text = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = os.times()
    cpu = after.children_user + after.children_system
    told: dict[str, Any] = json.loads(text.splitlines()[-1])
    told["seconds"] = time.perf_counter() - begun
    told["cpu_seconds"] = cpu - before.children_user - before.children_system
    return told


def _row(case: str, runs: list[dict[str, Any]]) -> str:
    median = {name: statistics.median(run[name] for run in runs) for name in _FIGURES}
    times = [f"{median[name]:.1f}" for name in _FIGURES[:2]]
    sizes = [f"{median[name] / 1e6:,.0f}" for name in _FIGURES[2:]]
    return f"| {' | '.join([case, *times, *sizes, runs[0]['holds']])} |"


def _export(folder: str, size: str, context: str) -> None:
    """Export in this process, and print figures as JSON."""
    import resource

    from llm_coreml import export
    from llm_coreml.config import ExportConfig
    from llm_coreml.config.values import read_bytes
    from llm_coreml.progress import Silent

    def peak() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    class Peaks(Silent):
        """Notes the peak at the beginning of every stage."""

        before: dict[str, int] = {}

        def stage(self, name: str) -> None:
            self.before[name] = peak()

    config = ExportConfig(
        bits=4, context=int(context), seq_lengths=(1, 64), partition_size=read_bytes(size)
    )
    with tempfile.TemporaryDirectory(dir=folder) as output:
        path = Path(output, "out")
        bundle = export(
            Path(folder, "hf"), output=path, config=config, cache=False, progress=Peaks()
        )
        parts = bundle.manifest.program.partitions or ()
        told = {
            "peak_bytes": peak(),
            "lowering_peak_bytes": Peaks.before["verify"],
            "file_bytes": bundle.manifest.program.bytes,
            "holds": "; ".join(part.holds for part in parts) or "all",
        }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
