"""Time, memory and size of an export, ours against ExecuTorch's own Core ML Llama script.

The model has the widths and the vocabulary of Llama-3.2-1B (tied, llama3 RoPE, bf16) or of
Llama-3.1-8B, random weights and as many layers as asked for. It is written once as a Hugging Face
folder for us and, with the same weights, as Meta's checkpoint for the peer. Every export runs in a
process of its own; the cases alternate, so that a change in the machine's load meets all of them.

    python benchmarks/export_cost.py --layers 2 --repeats 3
    python benchmarks/export_cost.py --cases ours-b4w,peer-b4w
    python benchmarks/export_cost.py --cases ours-b4w-calibrated
    python benchmarks/export_cost.py --model 8b --cases ours-b4w-short
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.

_PEER = "executorch.examples.apple.coreml.llama.export_static_llm_coreml"
_MAKER = Path(__file__).with_name("random_llama.py")
_LAYERS = {"1b": 16, "8b": 32}


@dataclass(frozen=True)
class Case:
    """One export to measure.

    Attributes:
        formats: Weight formats of the linear layers, the token table and the head.
        settings: Arguments of `export` for us, of the script for the peer.
        peer: The case that its figures are divided by, if there is one.
    """

    formats: str
    settings: dict[str, Any]
    peer: str | None = None


_SHORT = {"target": "gpu", "seq_lengths": [1, 64], "context": 256}
_TEXT = {"calibrate": "bundled", "calibration_tokens": 16384}
_C4W = {"scheme": "int4-channel", "target": "ane"}
CASES = {
    "ours-b4w": Case("int4 group 32; int8 table, tied", {"target": "gpu"}, "peer-b4w"),
    "peer-b4w": Case("int4 group 32; int8 table, int4 head", {"--linear_quantize": "b4w"}),
    "ours-b4w-calibrated": Case(
        "int4 group 32, calibrated; int8 table, tied", {"target": "gpu", **_TEXT}
    ),
    "ours-b4w-short": Case("int4 group 32; int8 table and head; lengths 1 and 64", _SHORT),
    "ours-c4w": Case("int4 channel; int8 table, tied", _C4W, "peer-c4w"),
    "ours-c4w-untied": Case(
        "int4 channel; int8 table, int4 head", {**_C4W, "lm_head": "int4-channel"}, "peer-c4w"
    ),
    "peer-c4w": Case("int4 channel; int8 table, int4 head", {"--linear_quantize": "c4w"}),
}


@dataclass(frozen=True)
class Measurement:
    """What one export, or the median of several, took.

    Attributes:
        seconds: Wall time from the start of the process to its end.
        cpu_seconds: Processor time of all its threads; a busy machine changes it least.
        unverified_seconds: Wall time without what verification alone needs, which the peer has
            not: what the quantized model says of a text, read before lowering, and the last stage.
        unverified_cpu_seconds: Processor time without that.
        peak_bytes: Peak resident memory.
        unverified_peak_bytes: The same up to the last stage.
        file_bytes: Size of the `.pte`.
        stages: Seconds of each stage of ours.
        peaks: Peak resident memory at the end of each stage, in bytes.
        verification: Its figures, out of the manifest.
    """

    seconds: float
    cpu_seconds: float
    unverified_seconds: float
    unverified_cpu_seconds: float
    peak_bytes: int
    unverified_peak_bytes: int
    file_bytes: int
    stages: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)


_FIGURES = {
    "seconds": "s",
    "cpu_seconds": "CPU s",
    "peak_bytes": "peak MB",
    "unverified_seconds": "unverified: s",
    "unverified_cpu_seconds": "CPU s",
    "unverified_peak_bytes": "peak MB",
    "file_bytes": "file MB",
}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        export_ours(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=tuple(_LAYERS), default="1b", help="its widths (1b)")
    parser.add_argument("--layers", type=int, help="layers (as the real model has)")
    parser.add_argument("--repeats", type=int, default=1, help="exports per case (1)")
    parser.add_argument("--context", type=int, default=1024, help="positions of the cache (1024)")
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas (all)")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    chosen = options.cases.split(",")
    unknown = [name for name in chosen if name not in CASES]
    layers = _LAYERS[options.model] if options.layers is None else options.layers
    if unknown or layers < 1 or options.repeats < 1:
        parser.error(f"--cases takes {', '.join(CASES)}; --layers and --repeats take 1 or more")
    if options.model != "1b" and any(name.startswith("peer") for name in chosen):
        parser.error("the peer needs a copy of all weights in fp32: it is compared at --model 1b")
    with tempfile.TemporaryDirectory(prefix="export-cost-") as name:
        folder = Path(name)
        kinds = "hf,meta" if any(case.startswith("peer") for case in chosen) else "hf"
        _run([sys.executable, str(_MAKER), name, options.model, str(layers), kinds], folder)
        runs: dict[str, list[Measurement]] = {case: [] for case in chosen}
        for _ in range(options.repeats):
            for case in chosen:
                runs[case].append(measure(case, folder, options.context))
                print(f"{case}: {runs[case][-1].seconds:.1f} s", file=sys.stderr)
    medians = {case: median(results) for case, results in runs.items()}
    if options.format == "json":
        print(json.dumps(as_json(options, medians)))
    else:
        print_table(medians)


def measure(name: str, folder: Path, context: int) -> Measurement:
    """Run one export in a new process."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        program, notes = Path(scratch, "model.pte"), Path(scratch, "notes.json")
        if name.startswith("peer"):
            command = [sys.executable, "-m", _PEER, "--output", str(program)]
            command += ["--checkpoint", str(folder / "meta" / "consolidated.00.pth")]
            command += ["--params", str(folder / "meta" / "params.json")]
            command += ["--max_context_len", str(context)]
            command += [word for setting in case.settings.items() for word in setting]
        else:
            settings = json.dumps({"context": context, **case.settings})
            model = folder / ("hf-text" if "calibrate" in case.settings else "hf")
            command = [sys.executable, __file__, "--child", str(model), scratch, settings]
        started = time.time()
        seconds, cpu, peak = _run(command, folder)
        size = program.stat().st_size
        if name.startswith("peer"):
            return Measurement(seconds, cpu, seconds, cpu, peak, peak, size)
        told = json.loads(notes.read_text())
    begun = told["begun"]
    stages = {"imports": begun["open"] - started}
    names, ends = list(begun), [*list(begun.values())[1:], started + seconds]
    stages |= {stage: end - begun[stage] for stage, end in zip(names, ends, strict=True)}
    return Measurement(
        seconds,
        cpu,
        seconds - stages["read"] - stages["verify"],
        told["unverified_cpu"],
        peak,
        told["peak_before_verify"],
        size,
        stages,
        told["peaks"],
        told["verification"],
    )


def _run(command: list[str], folder: Path) -> tuple[float, float, int]:
    """Run `command` to its end; return wall seconds, processor seconds and peak memory in bytes."""
    log = folder / "log.txt"
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with log.open("wb") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            # wait4 gives the figures of this one process and its children.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{tail}\n{' '.join(command)} failed with {process.returncode}.")
    return seconds, usage.ru_utime + usage.ru_stime, _in_bytes(usage.ru_maxrss)


def _in_bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def median(runs: list[Measurement]) -> Measurement:
    """Take the median of every figure by itself."""
    figures = {name: statistics.median(getattr(run, name) for run in runs) for name in _FIGURES}
    stages = {
        stage: statistics.median(run.stages[stage] for run in runs) for stage in runs[0].stages
    }
    peaks = {
        stage: int(statistics.median(run.peaks[stage] for run in runs)) for stage in runs[0].peaks
    }
    return Measurement(**figures, stages=stages, peaks=peaks, verification=runs[-1].verification)


def ratios(medians: dict[str, Measurement]) -> dict[str, dict[str, float]]:
    """Divide each of our cases by its peer, where that was measured."""
    found = {}
    for name, ours in medians.items():
        peer = CASES[name].peer
        if peer is not None and peer in medians:
            theirs = medians[peer]
            found[name] = {key: getattr(ours, key) / getattr(theirs, key) for key in _FIGURES}
    return found


def as_json(options: argparse.Namespace, medians: dict[str, Measurement]) -> dict[str, Any]:
    """Return everything measured as JSON values."""
    return {
        "model": options.model,
        "layers": options.layers or _LAYERS[options.model],
        "repeats": options.repeats,
        "cpus": os.cpu_count(),
        "cases": {
            name: {"context": options.context, **CASES[name].settings, **asdict(result)}
            for name, result in medians.items()
        },
        "ratios": ratios(medians),
    }


def print_table(medians: dict[str, Measurement]) -> None:
    """Print figures and ratios as Markdown tables."""
    heads = " | ".join(_FIGURES.values())
    print(f"| case | formats | {heads} |")
    print("|---|---|" + "--:|" * len(_FIGURES))
    for name, result in medians.items():
        row = " | ".join(
            f"{getattr(result, key) / 1e6:.0f}" if "bytes" in key else f"{getattr(result, key):.0f}"
            for key in _FIGURES
        )
        print(f"| {name} | {CASES[name].formats} | {row} |")
    print(f"\n| ours / peer | {heads.replace(' MB', '')} |")
    print("|---|" + "--:|" * len(_FIGURES))
    for name, values in ratios(medians).items():
        row = " | ".join(f"{values[key]:.2f}" for key in _FIGURES)
        print(f"| {name} / {CASES[name].peer} | {row} |")
    print()
    for name, result in medians.items():
        if result.stages:
            stages = ", ".join(
                f"{stage} {value:.1f} (peak {result.peaks[stage] / 1e6:.0f} MB)"
                for stage, value in result.stages.items()
            )
            checked = result.verification
            print(
                f"- {name}: seconds: {stages}. Verified {checked['tokens']} tokens, "
                f"{checked['rows']} rows: relative error {checked['max_relative_error']:.1e}, "
                f"mean KL {checked['mean_kl']:.1e}."
            )


# What follows runs in processes of its own.


def export_ours(model: str, scratch: str, settings: str) -> None:
    """Export, and leave `model.pte` and `notes.json` in `scratch`."""
    import resource

    from llm_coreml.config import ExportConfig
    from llm_coreml.machine import keep_one_heap
    from llm_coreml.pipeline import export

    keep_one_heap()  # as the command line does

    begun: dict[str, float] = {}
    peaks: dict[str, int] = {}
    cpu: dict[str, float] = {}

    def measure() -> int:
        return _in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    class Clock:
        def stage(self, name: str) -> None:
            peaks[next(reversed(begun), "imports")] = measure()
            begun[name] = time.time()
            cpu[name] = time.process_time()

        def advance(self, share: float) -> None:
            pass

        def note(self, text: str) -> None:
            print(text)

    given = json.loads(settings)
    given["seq_lengths"] = tuple(given["seq_lengths"]) if "seq_lengths" in given else None
    config = ExportConfig(bits=4, **given)
    folder = Path(scratch)
    bundle = export(
        model, output=folder / "bundle", config=config, cache=folder / "cache", progress=Clock()
    )
    bundle.program.rename(folder / "model.pte")
    notes = {
        "begun": begun,
        "peaks": {**peaks, next(reversed(begun)): measure()},
        "peak_before_verify": peaks[list(begun)[-2]],
        # The judge's reading lies between quantizing and lowering.
        "unverified_cpu": cpu["verify"] - (cpu["lower"] - cpu["read"]),
        "verification": bundle.manifest.verification.to_json(),
    }
    (folder / "notes.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main()
