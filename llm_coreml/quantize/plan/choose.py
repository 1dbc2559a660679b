"""Decide the format of every matrix: by flags, by an earlier plan, or by what each costs the model.

plan, measured = choose_plan(model, job, tokenizer)
measured.losses["layers.0.mlp.down_proj"]              # of the format that the plan gives it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_coreml.config import Job
from llm_coreml.decoder import DecoderSpec
from llm_coreml.model import Model
from llm_coreml.quantize.calibrate.text import BUNDLED_TEXT, CalibrationText, read_content, tokenize
from llm_coreml.quantize.plan.allocate import Option, allocate
from llm_coreml.quantize.plan.budget import matrix_bits, mixed_options
from llm_coreml.quantize.plan.imported import (
    import_report,
    keeps_codes,
    left_as_is,
    refuse_inexact,
    with_imports,
)
from llm_coreml.quantize.plan.plan import QuantizationPlan, make_plan, matrices
from llm_coreml.quantize.plan.plan_file import parse_plan, read_plan
from llm_coreml.quantize.plan.sensitivity import sensitivities
from llm_coreml.quantize.rotate.rotation import rotated

# A thousand tokens say as much of formats as their divergences differ between texts; in short
# windows more of them are independent, and a block's gradients take little memory.
_TOKENS, _WINDOW = 1024, 128


@dataclass(frozen=True)
class Measured:
    """What a plan was chosen by.

    Attributes:
        text: What was read.
        losses: Estimated KL divergence of each matrix of the blocks in its format, alone, in nats
            per token.
    """

    text: CalibrationText
    losses: dict[str, float]


def plan_without_weights(job: Job, spec: DecoderSpec) -> QuantizationPlan:
    """Return the plan that settings alone decide; of mixed formats, the smallest possible one.

    Raises:
        ConfigError: settings contradict each other, or `--plan` cannot be read or does not fit.
        UnsupportedError: Core ML, the target or a shape does not allow it, or no mix of formats
            comes to the bits or bytes asked for.
    """
    if job.weights.plan is not None:
        return make_plan(job, spec, read_plan(Path(job.weights.plan), job, spec))
    if not job.weights.mixed:
        return make_plan(job, spec)
    options = mixed_options(job, spec)
    matrix_bits(job, spec, options)
    return make_plan(job, spec, {name: schemes[0] for name, schemes in options.items()})


def choose_plan(
    model: Model,
    job: Job,
    tokenizer: Path,
    on_progress: Callable[[float], None] = lambda _: None,
) -> tuple[QuantizationPlan, Measured | None]:
    """Return the plan of an export, and what it was chosen by if formats are mixed.

    Args:
        model: What is exported.
        job: Settings.
        tokenizer: The model's `tokenizer.json`, which may be absent.
        on_progress: Called with the share of measuring done, 0 to 1.

    Raises:
        LlmCoreMLError: as `plan_without_weights` and `sensitivities` say; or there is no tokenizer
            for the text.
    """
    if import_report(model.checkpoint) is not None:
        return plan_for(job, model), None
    if not job.weights.mixed:
        return plan_without_weights(job, model.spec), None
    options = mixed_options(job, model.spec)
    budget = matrix_bits(job, model.spec, options)
    text = _text(job, tokenizer)
    weights, spec = rotated(model.weights, model.spec, job.weights.rotate)
    losses = sensitivities(weights, spec, text.windows, options, on_progress)
    shapes = dict(matrices(model.spec))
    items = [
        [
            Option(scheme.stored_bits(shapes[name]), loss)
            for scheme, loss in zip(schemes, losses[name], strict=True)
        ]
        for name, schemes in options.items()
    ]
    chosen = dict(zip(options, allocate(items, budget), strict=True))
    plan = make_plan(job, model.spec, {name: options[name][at] for name, at in chosen.items()})
    return plan, Measured(text, {name: losses[name][at] for name, at in chosen.items()})


def plan_for(job: Job, model: Model) -> QuantizationPlan:
    """Choose the scheme of each matrix, or find it in a checkpoint that is quantized already.

    Raises:
        CheckpointError: scales of a quantized checkpoint are damaged.
        ConfigError: settings contradict each other, or choose what is chosen already.
        UnsupportedError: Core ML or the target cannot hold a matrix, or only inexactly.
        ValueError: codes are to be chosen of a model that was not expanded, see `as_asked`.
    """
    report = import_report(model.checkpoint)
    if report is None:
        return make_plan(job, model.spec)
    if not keeps_codes(job):
        raise ValueError("a quantized model whose codes are chosen again must be expanded first")
    refuse_inexact(report, job)
    held = {name.removesuffix(".weight"): form for name, form in model.weights.forms().items()}
    plan = make_plan(left_as_is(job), model.spec)
    return with_imports(plan, job, model.spec, held)


def plan_of(recorded: Mapping[str, Any] | None, job: Job, spec: DecoderSpec) -> QuantizationPlan:
    """Return the plan that a manifest records, or what the settings say if it records none.

    Raises:
        ConfigError: it does not fit the model.
    """
    chosen = None if recorded is None else parse_plan(recorded, job, spec)
    return make_plan(job, spec, chosen)


def _text(job: Job, tokenizer: Path) -> CalibrationText:
    """Return the beginning of the text that calibration reads, or of the bundled one."""
    source = job.calibration.calibrate or BUNDLED_TEXT
    flag = "--size" if job.weights.bits is None else f"--bits {job.weights.bits}"
    return tokenize(
        source,
        read_content(source),
        tokenizer,
        min(_TOKENS, job.calibration.calibration_tokens),
        min(_WINDOW, job.shapes.context),
        flag,
    )
