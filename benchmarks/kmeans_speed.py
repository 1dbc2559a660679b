"""Codebooks of ours against torchao's: time, squared error, and distance to the least error.

Either side gets the same fp32 matrix and makes tables and codes of it; the two take turns in one
process with one thread. Errors are those of tables rounded to fp16, as a program stores them. The
least error is that of `kmeans1d` (`pip install kmeans1d`), on a few groups of every case; without
it the column stays empty.

    python benchmarks/kmeans_speed.py
    python benchmarks/kmeans_speed.py --shapes 2048x2048 --bits 4 --repeats 3 --format json

The matrices are Gaussian, Student's t with three degrees of freedom and a few values a hundred
times as large, and the token table of the bundled model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors import safe_open
from torchao.prototype.quantization.codebook_coreml import CodebookWeightOnlyConfig
from torchao.quantization import quantize_

from llm_coreml.quantize.formats.kmeans import kmeans

try:
    import kmeans1d
except ImportError:
    kmeans1d = None

_DEMO = Path(__file__).resolve().parent.parent / "llm_coreml" / "demo" / "model.safetensors"
_BLOCKS = {"16 rows": [16, -1], "32 columns": [-1, 32], "matrix": [-1, -1]}
# kmeans1d takes some microseconds per value.
_MOST_VALUES = 1 << 19


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="2048x2048,8192x2048", help="of random matrices")
    parser.add_argument("--bits", default="3,4")
    parser.add_argument("--weights", default="gaussian,student,demo")
    parser.add_argument("--tables", default=",".join(_BLOCKS), help="what shares a table")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side (1)")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    compare(torch.randn(32, 64), [16, -1], 2, 1)  # imports, and first calls, are not timed
    cases = []
    for kind, weight in matrices(options.weights.split(","), options.shapes.split(",")):
        for tables in options.tables.split(","):
            for bits in map(int, options.bits.split(",")):
                case = {"weights": kind, "shape": list(weight.shape), "tables": tables}
                case |= {"bits": bits, **compare(weight, _BLOCKS[tables], bits, options.repeats)}
                print(case, file=sys.stderr)
                cases.append(case)
    found = {"cases": cases, "summary": summary(cases)}
    if options.format == "json":
        print(json.dumps(found))
    else:
        print_table(found)


def matrices(kinds: list[str], shapes: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each kind of matrix in each shape; the bundled model's has its own."""
    torch.manual_seed(0)
    for kind in kinds:
        if kind == "demo":
            with safe_open(_DEMO, framework="pt") as file:
                yield kind, file.get_tensor("model.embed_tokens.weight").float()
            continue
        for shape in shapes:
            size = tuple(map(int, shape.split("x")))
            if kind == "gaussian":
                yield kind, torch.randn(size) * 0.02
            else:
                weight = torch.distributions.StudentT(3.0).sample(size) * 0.02
                weight.view(-1)[:: 1 << 20] *= 100
                yield kind, weight


def grouped(matrix: torch.Tensor, block: list[int]) -> torch.Tensor:
    """Return `matrix` as `[groups, values]`, where a group shares a table."""
    rows, columns = matrix.shape
    if block[0] != -1:
        return matrix.reshape(rows // block[0], -1)
    width = columns if block[1] == -1 else block[1]
    return matrix.reshape(rows, columns // width, width).transpose(0, 1).reshape(-1, rows * width)


def compare(weight: torch.Tensor, block: list[int], bits: int, repeats: int) -> dict[str, Any]:
    """Run both sides in turn; return the medians of paired ratios, and the errors."""

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return kmeans(grouped(weight, block), bits)

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        layer = torch.nn.Linear(1, 1, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(layer, CodebookWeightOnlyConfig(getattr(torch, f"uint{bits}"), block))
        tables = layer.weight.codebook.view(-1, 2**bits)
        return tables, grouped(layer.weight.codes, block)

    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats)]
    (mine, my_result), (_, their_result) = pairs[-1]
    values = grouped(weight, block)
    my_error, their_error = error(values, *my_result), error(values, *their_result)
    few = slice(0, _MOST_VALUES // values.shape[1])
    best = optimum(values[few], 2**bits)
    return {
        "ns_per_value": 1e9 * mine["cpu"] / values.numel(),
        "wall_ratio": statistics.median(b[0]["wall"] / a[0]["wall"] for a, b in pairs),
        "cpu_ratio": statistics.median(b[0]["cpu"] / a[0]["cpu"] for a, b in pairs),
        "error_ratio": float(my_error.sum() / their_error.sum()),
        "error_over_least": float(my_error[few].sum()) / best if best else None,
        "their_error_over_least": float(their_error[few].sum()) / best if best else None,
    }


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Return seconds of wall and of CPU, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def error(values: torch.Tensor, tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the squared error of each group with tables rounded to fp16, fp64."""
    rounded = tables.half().float()
    pieces = zip(values, rounded, codes, strict=True)
    return torch.stack(
        [(t[c.long()] - v).double().square_().sum() for v, t, c in pieces],
    )


def optimum(values: torch.Tensor, entries: int) -> float | None:
    """Return the least squared error over all groups of `values`, or None if it is not known."""
    if kmeans1d is None or not len(values):
        return None
    total = 0.0
    for group in values.double():
        codes, means = kmeans1d.cluster(group.numpy(), entries)
        total += float((torch.tensor(means)[torch.tensor(codes)] - group).square().sum())
    return total


def summary(cases: list[dict[str, Any]]) -> dict[str, float | None]:
    least = [case["error_over_least"] for case in cases if case["error_over_least"]]
    return {
        "wall_ratio_worst": min(case["wall_ratio"] for case in cases),
        "wall_ratio_median": statistics.median(case["wall_ratio"] for case in cases),
        "cpu_ratio_worst": min(case["cpu_ratio"] for case in cases),
        "cpu_ratio_median": statistics.median(case["cpu_ratio"] for case in cases),
        "error_ratio_worst": max(case["error_ratio"] for case in cases),
        "error_over_least_worst": max(least, default=None),
    }


def print_table(found: dict[str, Any]) -> None:
    print("| weights | shape | a table for | bits | ns/value | times as fast: wall | CPU ", end="")
    print("| error / torchao's | error / least | torchao's / least |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for case in found["cases"]:
        shape = "x".join(map(str, case["shape"]))
        least, theirs = (
            "" if case[key] is None else f"{case[key]:.4f}"
            for key in ("error_over_least", "their_error_over_least")
        )
        print(
            f"| {case['weights']} | {shape} | {case['tables']} | {case['bits']} "
            f"| {case['ns_per_value']:.1f} | {case['wall_ratio']:.0f} | {case['cpu_ratio']:.0f} "
            f"| {case['error_ratio']:.3f} | {least} | {theirs} |"
        )
    print()
    for key, value in found["summary"].items():
        print(f"{key}: {'unknown' if value is None else format(value, '.4g')}")


if __name__ == "__main__":
    main()
