"""Small exports whose programs keep their bytes, and the hashes that these had.

    python tests/helpers/golden.py           # hold today's code against golden.json
    python tests/helpers/golden.py --update    # record what it writes, if the change was meant

Each case is a command line, so that nothing but the product's own surface is asked. The bytes
follow from the versions of libraries and from the processor's fp32 sums too: the hashes hold where
these are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from exported import make_model, save_model
from packers import checkpoint, gptq, mlx, mxfp4
from tiny import llama, mistral, save

RECORD = Path(__file__).parent / "golden.json"
_PACKAGES = ("torch", "torchao", "coremltools", "executorch", "transformers", "numpy")
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_SHAPES = "--context 32 --seq-lengths 1,8"
_SIZES = {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 96}


@dataclass(frozen=True)
class Golden:
    """One export: what writes the checkpoint, and the flags."""

    flags: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Path, Mapping[str, Any]], object] = lambda folder, sizes: save(
        llama(**{**_SIZES, **sizes}), folder
    )


def _with_tokenizer(folder: Path, sizes: Mapping[str, Any]) -> Path:
    return save_model(folder, make_model(num_hidden_layers=2, **sizes))


def _gptq(folder: Path, sizes: Mapping[str, Any]) -> object:
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    return checkpoint(folder, settings, gptq(4, 32, 1, (1, 15), seed=3), **sizes)


def _mlx(folder: Path, sizes: Mapping[str, Any]) -> object:
    settings = {"quantization": {"group_size": 32, "bits": 4}}
    return checkpoint(folder, settings, mlx(4, 32, whole=True), tables=True, **sizes)


def _mxfp4(folder: Path, sizes: Mapping[str, Any]) -> object:
    settings = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    return checkpoint(folder, settings, mxfp4(True), **sizes)


def _mistral(folder: Path, sizes: Mapping[str, Any]) -> Path:
    return save(mistral(**{**_SIZES, **sizes}, sliding_window=None).to(torch.bfloat16), folder)


CASES: Mapping[str, Golden] = {
    "default": Golden(_SHAPES, {"tie_word_embeddings": True}, _with_tokenizer),
    "ane": Golden(f"{_SHAPES} --target ane", {"tie_word_embeddings": True}, _with_tokenizer),
    "all units, all logits": Golden(f"{_SHAPES} --target all --logits all"),
    "unquantized": Golden(f"{_SHAPES} --scheme none --embedding none"),
    "fp32": Golden(f"{_SHAPES} --compute-precision fp32 --target cpu"),
    "one length": Golden("--context 32 --seq-lengths 1", {"num_key_value_heads": 4}),
    "three lengths": Golden("--context 64 --seq-lengths 1,3,64", {"head_dim": 48}),
    "llama3 rope": Golden(
        "--context 96 --seq-lengths 1,8",
        {"rope_parameters": _LLAMA3, "max_position_embeddings": 96},
    ),
    "biases": Golden(_SHAPES, {"attention_bias": True, "mlp_bias": True}),
    "mistral, iOS26": Golden(f"{_SHAPES} --minimum-os iOS26", {}, _mistral),
    "tied, formats apart": Golden(
        f"{_SHAPES} --scheme int8-channel --embedding int4-channel --lm-head codebook:4",
        {"tie_word_embeddings": True},
    ),
    "int4 channel, zero points": Golden(f"{_SHAPES} --scheme int4-channel --zero-point int"),
    "int8 group, float zero points": Golden(f"{_SHAPES} --scheme int8-group --zero-point float"),
    "blocks of tables": Golden(f"{_SHAPES} --bits 3 --codebook-rows 8 --codebook-columns 16"),
    "vectors, scaled rows": Golden(
        f"{_SHAPES} --bits 4 --scheme codebook --codebook-scale --lm-head none"
    ),
    "mxfp4": Golden(
        f"{_SHAPES} --scheme mxfp4 --minimum-os iOS26 --embedding int6-group",
    ),
    "rotated": Golden(
        f"{_SHAPES} --scheme int4-channel --rotate both", {"tie_word_embeddings": True}
    ),
    "calibrated": Golden(
        f"{_SHAPES} --calibrate bundled --calibration-tokens 256", {}, _with_tokenizer
    ),
    "calibrated codebook, rotated": Golden(
        f"{_SHAPES} --bits 2 --target ane --calibrate bundled --calibration-tokens 256"
        " --rotate residual",
        {},
        _with_tokenizer,
    ),
    "tuned": Golden(
        f"{_SHAPES} --calibrate bundled --calibration-tokens 256 --tune 8", {}, _with_tokenizer
    ),
    "mixed bits": Golden(f"{_SHAPES} --bits 3.5", {}, _with_tokenizer),
    "bytes of gptq": Golden(_SHAPES, {"num_hidden_layers": 2}, _gptq),
    "mlx, token table too": Golden(_SHAPES, {}, _mlx),
    "mxfp4 of mlx": Golden(_SHAPES, {}, _mxfp4),
    "twin": Golden(f"{_SHAPES} --backend xnnpack", {"tie_word_embeddings": True}, _with_tokenizer),
}


def environment() -> dict[str, str]:
    """Return what bytes follow from, beside the project's code."""
    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version().rpartition(".")[0],
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def program_hash(name: str, folder: Path) -> str:
    """Export a case by the command line, and return the SHA-256 of its program."""
    case = CASES[name]
    case.make(folder / "model", case.sizes)
    words = ["export", str(folder / "model"), "-o", str(folder / "out"), "--no-cache"]
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="llm-coreml")
    printed = io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.object(sys, "argv", ["llm-coreml", *words, *case.flags.split()]),
            contextlib.redirect_stderr(printed),
            contextlib.redirect_stdout(printed),
        ):
            entry.load()()
    except SystemExit as ended:
        if ended.code:
            raise AssertionError(f"{name}: {printed.getvalue()}") from None
    finally:
        torch.set_num_threads(threads)
    return hashlib.sha256((folder / "out" / "model.pte").read_bytes()).hexdigest()


def recorded() -> dict[str, Any]:
    """Return what `golden.json` holds."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def main() -> None:
    """Compare all cases with the record, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="record instead of comparing")
    update = parser.parse_args().update
    found = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = program_hash(name, Path(folder))
        known = None if update else recorded()["programs"].get(name)
        told = "recorded" if update else "equal" if known == found[name] else "CHANGED"
        print(f"{found[name][:16]}  {told:8}  {name}", flush=True)
    if update:
        content = {"environment": environment(), "programs": found}
        RECORD.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
