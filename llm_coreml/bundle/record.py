"""The manifest of an export, made from what the export did."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_coreml.artifact.description import Description
from llm_coreml.bundle.manifest import (
    MANIFEST_VERSION,
    Allocation,
    Calibration,
    Group,
    Import,
    Manifest,
    Plan,
    Program,
    Quantization,
    RotatedSpace,
    Rotations,
    Source,
    Target,
    Tuned,
)
from llm_coreml.bundle.seal import file_sha256
from llm_coreml.bundle.typed_json import read_record
from llm_coreml.checkpoint import Source as CheckpointSource
from llm_coreml.config import ExportConfig, Job
from llm_coreml.decoder import DecoderSpec
from llm_coreml.heads import LOGITS
from llm_coreml.quantize.calibrate.text import CalibrationText
from llm_coreml.quantize.calibrate.tune import Tuning
from llm_coreml.quantize.formats.schemes import Scheme
from llm_coreml.quantize.kept_codes import kept_program
from llm_coreml.quantize.low_rank import factor_bits, largest_rank
from llm_coreml.quantize.plan.choose import Measured
from llm_coreml.quantize.plan.imported import ImportReport, import_report, quantized_in
from llm_coreml.quantize.plan.plan import QuantizationPlan, beside_blocks, matrices
from llm_coreml.quantize.plan.plan_file import plan_json
from llm_coreml.quantize.quantized import Quantized
from llm_coreml.quantize.rotate.hadamard import SEED
from llm_coreml.quantize.rotate.rotation import rotations
from llm_coreml.targets import BACKENDS
from llm_coreml.verify.verification import Verification

Stored = tuple[Scheme, tuple[int, int]]

_PACKAGES = ("llm-coreml", "torch", "torchao", "executorch", "coremltools", "transformers")


def make_manifest(
    quantized: Quantized, description: Description, program: Path, verification: Verification
) -> Manifest:
    """Describe an export; equal inputs give equal manifests, which `sealed` completes.

    Args:
        quantized: What was exported, and how it was quantized.
        description: What the program offers.
        program: The `.pte`.
        verification: Its result.
    """
    model, job, plan = quantized.model, quantized.job, quantized.plan
    source, dequantized = model.source, BACKENDS[description.backend].stores_dense
    table = (model.spec.vocab_size, model.spec.hidden_size)
    measured, report = quantized.measured, import_report(model.checkpoint)
    losses = {} if measured is None else measured.losses
    factors = Beside(largest_rank(quantized.decoder), factor_bits(quantized.decoder))
    return Manifest(
        version=MANIFEST_VERSION,
        source=Source(source.kind, public_name(source), source.revision, model.sha256()),
        spec=model.spec.to_json(),
        config=public_config(job.config).to_json(),
        rebuild=tuple(rebuild_command(source, job.config)),
        quantization=Quantization(
            linear=_with_factors(_group(_linear(plan, model.spec), dequantized), factors),
            embedding=_group([(plan.embedding, table), *_beside(plan, model.spec)], dequantized),
            lm_head=_group([(plan.lm_head, table)], dequantized, elsewhere=plan.tied),
            tied=plan.tied,
            untied_bytes=plan.untied_bytes,
            bits_per_weight=32.0
            if dequantized
            else bits_per_weight(plan, model.spec, factors.bits),
            rotation=_rotation(job, model.spec),
            calibration=_calibration(job, quantized.calibration, quantized.tuning),
            allocation=None if measured is None else _allocation(measured),
            plan=read_record(Plan, plan_json(plan, model.spec, losses)),
            imported=_import(report),
            codes_of=None if job.weights.codes_of is None else kept_program(job.weights.codes_of),
            expanded=None if report is not None else quantized_in(model.checkpoint),
        ),
        program=_program(description, program),
        target=_target(job),
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        verification=verification,
    )


def _program(description: Description, path: Path) -> Program:
    main = description.methods[description.main]
    return Program(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        method=description.main,
        inputs=dict(text.split(" ", 1) for text in main.inputs),
        output=main.output,
        states=description.states,
        context=description.context,
        seq_lengths=main.seq_lengths,
        constant_methods=description.constant_methods,
        form=description.form,
        every_row=description.every_row,
        methods=description.methods,
        why=description.why,
        head=None if description.head == LOGITS else str(description.head),
        partitions=description.partitions or None,
    )


def public_name(source: CheckpointSource) -> str:
    """Return what a bundle may tell of its source: of a folder or file its own name, no path.

    A live model knows by which words it was loaded: a hub id, or the path of a folder.
    """
    if source.kind not in ("folder", "live"):
        return source.name
    is_path = source.name.count("/") > 1 or source.name.startswith(("/", ".", "~"))
    if source.kind == "live" and not is_path:
        return source.name
    return Path(os.path.abspath(os.path.expanduser(source.name))).name


def rebuild_command(source: CheckpointSource, config: ExportConfig) -> list[str]:
    """Return the command line that makes the same artifact again; none for a live model."""
    if source.kind == "live":
        return []
    name = public_name(source)
    # Not to be taken for a recipe or a hub id: the folder is wherever it is.
    words = ["llm-coreml", "export", f"./{name}" if source.kind == "folder" else name]
    if source.revision is not None:
        words += ["--revision", source.revision]
    return [*words, *public_config(config).flags()]


def public_config(config: ExportConfig) -> ExportConfig:
    """Return the settings as a bundle may tell them: of files their own names, no paths."""
    calibrate, plan, codes = (
        None if path is None else Path(os.path.abspath(path)).name
        for path in (config.calibrate, config.plan, config.codes_of)
    )
    return replace(config, calibrate=calibrate, plan=plan, codes_of=codes)


@dataclass(frozen=True)
class Beside:
    """What is stored beside matrices.

    Attributes:
        rank: Of the largest product, 0 where there is none.
        bits: What all products take, as fp16.
    """

    rank: int
    bits: int


def _with_factors(group: Group, beside: Beside) -> Group:
    """Count what is stored beside matrices to them."""
    if not beside.bits:
        return group
    weights = 8 * group.bytes / group.bits_per_weight
    return replace(
        group,
        label=f"{group.label} + fp16 products of rank {beside.rank} beside it",
        bits_per_weight=group.bits_per_weight + beside.bits / weights,
        bytes=group.bytes + beside.bits // 8,
    )


def bits_per_weight(plan: QuantizationPlan, spec: DecoderSpec, beside: int = 0) -> float:
    """Return stored bits per weight over all matrices, a tied table counted once.

    Args:
        plan: Their formats.
        spec: Their sizes.
        beside: Bits that are stored beside them.
    """
    table = (spec.vocab_size, spec.hidden_size)
    tables = (plan.embedding,) if plan.tied else (plan.embedding, plan.lm_head)
    stored = [*_linear(plan, spec), *_beside(plan, spec), *((scheme, table) for scheme in tables)]
    bits, weights = _cost(stored)
    return (bits + beside) / weights


def _linear(plan: QuantizationPlan, spec: DecoderSpec) -> list[Stored]:
    return [(plan.scheme_of(name), shape) for name, shape in matrices(spec)]


def _beside(plan: QuantizationPlan, spec: DecoderSpec) -> list[Stored]:
    return [(plan.scheme_of(name), shape) for name, shape in beside_blocks(spec)]


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


def _target(job: Job) -> Target:
    if not BACKENDS[job.backend].has_targets:
        return Target(job.backend, "cpu", "CPU", "any", opset="none", compute_precision="fp32")
    return Target(
        backend=job.backend,
        name=job.target.name,
        compute_unit=job.target.compute_unit,
        minimum_os=job.minimum_os,
        opset=job.opset,
        compute_precision=job.precision.name,
    )


def _group(stored: Sequence[Stored], dequantized: bool, elsewhere: bool = False) -> Group:
    """Describe matrices; the twin holds their dequantized values as fp32.

    Args:
        stored: Scheme and shape of each.
        dequantized: Whether it is the twin's.
        elsewhere: Whether another group holds their bytes.
    """
    schemes = Counter(scheme for scheme, _ in stored)
    only = stored[0][0] if len(schemes) == 1 else None
    label = only.label if only else _mixed_label(schemes, stored)
    bits, weights = _cost(stored)
    if dequantized:
        bits = 32 * weights
    return Group(
        scheme=only.name if only else "mixed",
        label=f"{label}, stored as fp32" if dequantized else label,
        bits=only.bits if only else None,
        bits_per_weight=bits / weights,
        bytes=0 if elsewhere else round(bits / 8),
        matrices=len(stored),
    )


def _rotation(job: Job, spec: DecoderSpec) -> Rotations | None:
    found = {
        space: RotatedSpace(rotation.size, rotation.label)
        for space, rotation in rotations(job.weights.rotate, spec).items()
    }
    return Rotations(found.get("residual"), found.get("heads"), SEED) if found else None


def _calibration(
    job: Job, text: CalibrationText | None, tuning: Tuning | None
) -> Calibration | None:
    if text is None:
        return None
    described = None if tuning is None else Tuned(tuning.steps, tuning.before, tuning.after)
    method = "GPTQ" if job.weights.pt2e == "none" else "ranges"
    return Calibration(method, text.name, text.tokens, len(text.windows), text.sha256, described)


def _allocation(measured: Measured) -> Allocation:
    text = measured.text
    # Divergences of matrices that are quantized one at a time add up, near enough.
    kl = math.fsum(measured.losses.values())
    return Allocation("Fisher", text.name, text.tokens, len(text.windows), text.sha256, kl)


def _import(found: ImportReport | None) -> Import | None:
    if found is None:
        return None
    return Import(found.format, found.matrices, found.exactness, found.largest_error, found.tensor)
