"""Time, memory and size of an export, ours against ExecuTorch's own Core ML Llama script.

The model has the widths and the vocabulary of Llama-3.2-1B (tied, llama3 RoPE, bf16), random
weights and as many layers as asked for. It is written once as a Hugging Face folder for us and,
with the same weights, as Meta's checkpoint for the peer. Every export runs in a process of its own;
the cases alternate, so that a change in the machine's load meets all of them.

    python benchmarks/export_1b_widths.py --layers 2 --repeats 3
    python benchmarks/export_1b_widths.py --layers 16 --cases ours-b4w,peer-b4w
    python benchmarks/export_1b_widths.py --cases ours-c4w,peer-c4w --format json
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.

_PEER = "executorch.examples.apple.coreml.llama.export_static_llm_coreml"
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_DIM, _VOCAB = 2048, 8192, 32, 8, 64, 128256
_LINEARS = {  # ours -> Meta's, rows, columns
    "self_attn.q_proj": ("attention.wq", _HEADS * _HEAD_DIM, _HIDDEN),
    "self_attn.k_proj": ("attention.wk", _KV_HEADS * _HEAD_DIM, _HIDDEN),
    "self_attn.v_proj": ("attention.wv", _KV_HEADS * _HEAD_DIM, _HIDDEN),
    "self_attn.o_proj": ("attention.wo", _HIDDEN, _HEADS * _HEAD_DIM),
    "mlp.gate_proj": ("feed_forward.w1", _INNER, _HIDDEN),
    "mlp.up_proj": ("feed_forward.w3", _INNER, _HIDDEN),
    "mlp.down_proj": ("feed_forward.w2", _HIDDEN, _INNER),
}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class Case:
    """One export to measure.

    Attributes:
        formats: Weight formats of the linear layers, the token table and the head.
        settings: Arguments of `export` for us, of the script for the peer.
        peer: The case that its figures are divided by; None for the peer itself.
    """

    formats: str
    settings: dict[str, Any]
    peer: str | None = None


_C4W = {"scheme": "int4-channel", "target": "ane"}
CASES = {
    "ours-b4w": Case("int4 group 32; int8 table, tied", {"target": "gpu"}, "peer-b4w"),
    "peer-b4w": Case("int4 group 32; int8 table, int4 head", {"--linear_quantize": "b4w"}),
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
        unverified_seconds: Wall time up to the verification; the peer has none.
        unverified_cpu_seconds: Processor time up to there.
        peak_bytes: Peak resident memory.
        unverified_peak_bytes: The same up to there.
        file_bytes: Size of the `.pte`.
        stages: Seconds of each stage of ours.
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
        child, *arguments = sys.argv[2:]
        children: dict[str, Callable[..., None]] = {"make-model": make_model, "export": export_ours}
        children[child](*arguments)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (2)")
    parser.add_argument("--repeats", type=int, default=1, help="exports per case (1)")
    parser.add_argument("--context", type=int, default=1024, help="positions of the cache (1024)")
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas (all)")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    chosen = options.cases.split(",")
    unknown = [name for name in chosen if name not in CASES]
    if unknown or options.layers < 1 or options.repeats < 1:
        parser.error(f"--cases takes {', '.join(CASES)}; --layers and --repeats take 1 or more")
    with tempfile.TemporaryDirectory(prefix="export-1b-widths-") as name:
        folder = Path(name)
        _run([sys.executable, __file__, "--child", "make-model", name, str(options.layers)], folder)
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
        if case.peer is None:
            command = [sys.executable, "-m", _PEER, "--output", str(program)]
            command += ["--checkpoint", str(folder / "meta" / "consolidated.00.pth")]
            command += ["--params", str(folder / "meta" / "params.json")]
            command += ["--max_context_len", str(context)]
            command += [word for setting in case.settings.items() for word in setting]
        else:
            settings = json.dumps({**case.settings, "context": context})
            command = [sys.executable, __file__, "--child", "export", str(folder / "hf"), scratch]
            command += [settings]
        started = time.time()
        seconds, cpu, peak = _run(command, folder)
        size = program.stat().st_size
        if case.peer is None:
            return Measurement(seconds, cpu, seconds, cpu, peak, peak, size)
        told = json.loads(notes.read_text())
    begun = told["begun"]
    stages = {"imports": begun["open"] - started}
    names, ends = list(begun), [*list(begun.values())[1:], started + seconds]
    stages |= {stage: end - begun[stage] for stage, end in zip(names, ends, strict=True)}
    return Measurement(
        seconds,
        cpu,
        begun["verify"] - started,
        told["cpu_before_verify"],
        peak,
        told["peak_before_verify"],
        size,
        stages,
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
    return Measurement(**figures, stages=stages, verification=runs[-1].verification)


def ratios(medians: dict[str, Measurement]) -> dict[str, dict[str, float]]:
    """Divide each of our cases by its peer, where that was measured."""
    found = {}
    for name, ours in medians.items():
        peer = CASES[name].peer
        if peer in medians:
            theirs = medians[peer]
            found[name] = {key: getattr(ours, key) / getattr(theirs, key) for key in _FIGURES}
    return found


def as_json(options: argparse.Namespace, medians: dict[str, Measurement]) -> dict[str, Any]:
    """Return everything measured as JSON values."""
    return {
        "layers": options.layers,
        "context": options.context,
        "repeats": options.repeats,
        "cpus": os.cpu_count(),
        "cases": {name: asdict(result) for name, result in medians.items()},
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
            stages = ", ".join(f"{stage} {value:.1f}" for stage, value in result.stages.items())
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
    from llm_coreml.pipeline import export

    begun: dict[str, float] = {}
    before_verify: dict[str, float] = {}

    class Clock:
        def stage(self, name: str) -> None:
            begun[name] = time.time()
            if name == "verify":
                usage = resource.getrusage(resource.RUSAGE_SELF)
                before_verify["peak_before_verify"] = _in_bytes(usage.ru_maxrss)
                before_verify["cpu_before_verify"] = usage.ru_utime + usage.ru_stime

        def advance(self, share: float) -> None:
            pass

        def note(self, text: str) -> None:
            print(text)

    config = ExportConfig(bits=4, **json.loads(settings))
    folder = Path(scratch)
    bundle = export(
        model, output=folder / "bundle", config=config, cache=folder / "cache", progress=Clock()
    )
    bundle.program.rename(folder / "model.pte")
    notes = {"begun": begun, "verification": bundle.manifest["verification"], **before_verify}
    (folder / "notes.json").write_text(json.dumps(notes))


def make_model(folder: str, layers: str) -> None:
    """Write the model as `hf/` and, with the same weights, as `meta/`."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    table, norm = draw(_VOCAB, _HIDDEN), torch.ones(_HIDDEN, dtype=torch.bfloat16)
    ours = {"model.embed_tokens.weight": table, "model.norm.weight": norm}
    # Meta writes the tied head out.
    theirs = {"tok_embeddings.weight": table, "output.weight": table, "norm.weight": norm}
    for layer in range(int(layers)):
        for name, (metas, rows, columns) in _LINEARS.items():
            weight = draw(rows, columns)
            ours[f"model.layers.{layer}.{name}.weight"] = weight
            theirs[f"layers.{layer}.{metas}.weight"] = _in_metas_order(name, weight)
        for name, metas in _NORMS.items():
            ours[f"model.layers.{layer}.{name}.weight"] = norm.clone()
            theirs[f"layers.{layer}.{metas}.weight"] = norm.clone()
    for kind in ("hf", "meta"):
        Path(folder, kind).mkdir()
    save_file(ours, Path(folder, "hf", "model.safetensors"), metadata={"format": "pt"})
    torch.save(theirs, Path(folder, "meta", "consolidated.00.pth"))
    Path(folder, "hf", "config.json").write_text(json.dumps(_hf_config(int(layers))))
    Path(folder, "meta", "params.json").write_text(json.dumps(_metas_params(int(layers))))


def _in_metas_order(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Interleave the two halves of each head, as Meta's RoPE wants queries and keys."""
    if name not in ("self_attn.q_proj", "self_attn.k_proj"):
        return weight
    halves = weight.view(-1, 2, _HEAD_DIM // 2, _HIDDEN)
    return halves.transpose(1, 2).reshape(weight.shape)


def _hf_config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


def _metas_params(layers: int) -> dict[str, Any]:
    return {
        "dim": _HIDDEN,
        "ffn_dim_multiplier": 1.5,
        "multiple_of": 256,
        "n_heads": _HEADS,
        "n_kv_heads": _KV_HEADS,
        "n_layers": layers,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "rope_scale_factor": 32,
        "vocab_size": _VOCAB,
    }


if __name__ == "__main__":
    main()
