"""What `manifest.json` says of an export; its JSON schema is `manifest.schema.json`."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_coreml.bundle.folder import MANIFEST_VERSION, file_sha256
from llm_coreml.checkpoint import Source
from llm_coreml.config import ExportConfig, Job
from llm_coreml.decoder import DecoderSpec
from llm_coreml.decoder.states import state_specs
from llm_coreml.quantize import QuantizationPlan, Scheme
from llm_coreml.quantize.calibrate.text import CalibrationText
from llm_coreml.quantize.calibrate.tune import Tuning
from llm_coreml.quantize.plan.choose import Measured
from llm_coreml.quantize.plan.imported import ImportReport, import_report
from llm_coreml.quantize.plan.plan import matrices
from llm_coreml.quantize.plan.plan_file import plan_json
from llm_coreml.quantize.quantized import Quantized
from llm_coreml.quantize.rotate.hadamard import SEED
from llm_coreml.quantize.rotate.rotation import rotations
from llm_coreml.verify.logits import Verification

Stored = tuple[Scheme, tuple[int, int]]

_PACKAGES = ("llm-coreml", "torch", "torchao", "executorch", "coremltools", "transformers")


def make_manifest(
    quantized: Quantized,
    program: Path,
    methods: dict[str, int | bool | list[int]],
    verification: Verification,
) -> dict[str, Any]:
    """Describe an export; equal inputs give equal manifests.

    Args:
        quantized: What was exported, and how it was quantized.
        program: The `.pte`.
        methods: Its constant methods.
        verification: Its result.
    """
    model, job, plan = quantized.model, quantized.job, quantized.plan
    measured, calibration = quantized.measured, quantized.calibration
    return {
        "version": MANIFEST_VERSION,
        "source": {**asdict(model.source), "sha256": model.sha256()},
        "spec": model.spec.to_json(),
        "config": job.config.to_json(),
        "rebuild": rebuild_command(model.source, job.config),
        "quantization": {
            **_quantization(plan, model.spec, job.backend == "xnnpack"),
            "rotation": _rotation(job, model.spec),
            "calibration": None
            if calibration is None
            else _calibration(calibration, quantized.tuning),
            "allocation": None if measured is None else _allocation(measured),
            "plan": plan_json(plan, model.spec, {} if measured is None else measured.losses),
            "import": _import(import_report(model.checkpoint)),
        },
        "program": {
            "file": program.name,
            "bytes": program.stat().st_size,
            "sha256": file_sha256(program),
            "method": "forward",
            "inputs": {"tokens": "int64 [1, S]", "start_pos": "int64 [1]"},
            "output": _output(job, model.spec),
            "states": _states(job, model.spec),
            "context": job.shapes.context,
            "seq_lengths": list(job.shapes.seq_lengths),
            "constant_methods": methods,
        },
        "target": _target(job),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "verification": verification.to_json(),
    }


def rebuild_command(source: Source, config: ExportConfig) -> list[str]:
    """Return the command line that makes the same artifact again; none for a live model."""
    if source.kind == "live":
        return []
    words = ["llm-coreml", "export", source.name]
    if source.revision is not None:
        words += ["--revision", source.revision]
    return [*words, *config.flags()]


def bits_per_weight(plan: QuantizationPlan, spec: DecoderSpec) -> float:
    """Return stored bits per weight over all matrices, a tied table counted once."""
    table = (spec.vocab_size, spec.hidden_size)
    tables = (plan.embedding,) if plan.tied else (plan.embedding, plan.lm_head)
    bits, weights = _cost([*_linear(plan, spec), *((scheme, table) for scheme in tables)])
    return bits / weights


def _linear(plan: QuantizationPlan, spec: DecoderSpec) -> list[Stored]:
    return [(plan.scheme_of(name), shape) for name, shape in matrices(spec)]


def _mixed_label(schemes: Counter[Scheme], stored: Sequence[Stored]) -> str:
    """Return the mean bits per weight, and how many matrices have which scheme, the small first."""
    bits, weights = _cost(stored)
    ordered = sorted(schemes.items(), key=lambda item: (item[0].bits, item[0].label))
    counts = "; ".join(f"{count} x {scheme.label}" for scheme, count in ordered)
    return f"mixed, {bits / weights:.2f} bits per weight: {counts}"


def _cost(stored: Sequence[Stored]) -> tuple[int, int]:
    """Return bits and weights of matrices."""
    bits = sum(scheme.stored_bits(shape) for scheme, shape in stored)
    return bits, sum(rows * columns for _, (rows, columns) in stored)


def _target(job: Job) -> dict[str, str]:
    if job.backend == "xnnpack":
        return {
            "backend": "xnnpack",
            "name": "cpu",
            "compute_unit": "CPU",
            "minimum_os": "any",
            "opset": "none",
            "compute_precision": "fp32",
        }
    return {
        "backend": "coreml",
        "name": job.target.name,
        "compute_unit": job.target.compute_unit,
        "minimum_os": job.minimum_os,
        "opset": job.opset,
        "compute_precision": job.precision.name,
    }


def _quantization(plan: QuantizationPlan, spec: DecoderSpec, dequantized: bool) -> dict[str, Any]:
    """Describe the weights; the twin holds their dequantized values as fp32, a tied table once."""
    table = (spec.vocab_size, spec.hidden_size)
    groups = {
        "linear": _linear(plan, spec),
        "embedding": [(plan.embedding, table)],
        "lm_head": [(plan.lm_head, table)],
    }
    described: dict[str, Any] = {}
    for name, stored in groups.items():
        schemes = Counter(scheme for scheme, _ in stored)
        only = stored[0][0] if len(schemes) == 1 else None
        label = only.label if only else _mixed_label(schemes, stored)
        bits, weights = _cost(stored)
        if dequantized:
            bits = 32 * weights
        described[name] = {
            "scheme": only.name if only else "mixed",
            "label": f"{label}, stored as fp32" if dequantized else label,
            "bits": only.bits if only else None,
            "bits_per_weight": bits / weights,
            "bytes": 0 if name == "lm_head" and plan.tied else round(bits / 8),
            "matrices": len(stored),
        }
    return {
        **described,
        "tied": plan.tied,
        "untied_bytes": plan.untied_bytes,
        "bits_per_weight": 32.0 if dequantized else bits_per_weight(plan, spec),
    }


def _rotation(job: Job, spec: DecoderSpec) -> dict[str, Any] | None:
    found = rotations(job.weights.rotate, spec)
    if not found:
        return None
    described: dict[str, Any] = {"residual": None, "heads": None, "seed": SEED}
    for space, rotation in found.items():
        described[space] = {"size": rotation.size, "factors": rotation.label}
    return described


def _calibration(text: CalibrationText, tuning: Tuning | None) -> dict[str, Any]:
    described = None
    if tuning is not None:
        described = {"steps": tuning.steps, "kl_before": tuning.before, "kl_after": tuning.after}
    return {**_read("GPTQ", text), "tuning": described}


def _allocation(measured: Measured) -> dict[str, Any]:
    # Divergences of matrices that are quantized one at a time add up, near enough.
    return {**_read("Fisher", measured.text), "kl": math.fsum(measured.losses.values())}


def _read(method: str, text: CalibrationText) -> dict[str, Any]:
    return {
        "method": method,
        "text": text.name,
        "tokens": text.tokens,
        "windows": len(text.windows),
        "sha256": text.sha256,
    }


def _import(report: ImportReport | None) -> dict[str, Any] | None:
    return None if report is None else asdict(report)


def _output(job: Job, spec: DecoderSpec) -> str:
    rows = "1" if job.logits == "last" else "S"
    return f"float32 [1, {rows}, {spec.vocab_size}]"


def _states(job: Job, spec: DecoderSpec) -> dict[str, str]:
    dtype = "float16" if job.backend == "coreml" else "float32"
    states = state_specs(spec, job.shapes.context)
    return {state.name: f"{dtype} {list(state.shape)}" for state in states}
