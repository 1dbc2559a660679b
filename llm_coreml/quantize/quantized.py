"""A model on its way to a program: everything that is decided and made before lowering.

    quantized = quantize(model, job, tokenizer, progress, cache)
    quantized.decoder, quantized.plan

An export and an evaluation of it both go this way, so that they mean the same decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llm_coreml.checkpoint.weights_view import Weights
from llm_coreml.config import ExportConfig, Job
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.norm import take_form
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.model import Model
from llm_coreml.progress import Progress
from llm_coreml.quantize.cache import WeightCache
from llm_coreml.quantize.calibrate.text import CalibrationText, read_content, tokenize
from llm_coreml.quantize.calibrate.tune import Tuning, tune
from llm_coreml.quantize.fill import fill
from llm_coreml.quantize.formats.schemes import Unquantized
from llm_coreml.quantize.kept_codes import KeptCodes
from llm_coreml.quantize.low_rank import attach, residual_factors
from llm_coreml.quantize.plan.choose import Measured, choose_plan
from llm_coreml.quantize.plan.imported import ImportReport, import_report, keeps_codes, quantized_in
from llm_coreml.quantize.plan.plan import QuantizationPlan
from llm_coreml.quantize.residual import shifted
from llm_coreml.quantize.rotate.rotation import rotated


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized decoder, with all that led to it.

    Attributes:
        model: What was quantized.
        job: Settings.
        plan: The format of every matrix.
        measured: What the plan was chosen by, if formats are mixed.
        calibration: The text that codes were chosen on, if any.
        tuning: What tuning did, if it was asked for.
        decoder: The result.
    """

    model: Model
    job: Job
    plan: QuantizationPlan
    measured: Measured | None
    calibration: CalibrationText | None
    tuning: Tuning | None
    decoder: Decoder


def quantize(
    model: Model,
    job: Job,
    tokenizer: Path,
    progress: Progress,
    cache: WeightCache | None = None,
    plan: QuantizationPlan | None = None,
    calibration: CalibrationText | None = None,
) -> Quantized:
    """Choose formats, read the text that is asked for, quantize every matrix, and tune.

    Args:
        model: What to quantize.
        job: Settings.
        tokenizer: The model's `tokenizer.json`, which may be absent.
        progress: Told of stages, shares and notes.
        cache: Where quantized weights are looked up and kept.
        plan: Formats that were chosen before; None chooses them.
        calibration: The text that `job` asks for, where it was read before; None reads it.

    Raises:
        CheckpointError: a tensor, or what a layer gets, is not finite.
        ConfigError: settings contradict each other, or a text cannot be used.
        UnsupportedError: Core ML, the target or a matrix does not allow a format.
    """
    asked = as_asked(model, job, progress)
    model, beside = with_adapters(asked, job, progress)
    measured = None
    if plan is None:
        if job.weights.mixed:
            progress.stage("allocate")
        plan, measured = choose_plan(model, job, tokenizer, progress.advance)
    _tell_of_the_import(progress, import_report(model.checkpoint))
    _tell_of_the_head(progress, model, job, plan)
    if calibration is None:
        calibration = read_calibration(job, tokenizer)
    progress.stage("quantize" if calibration is None else "calibrate")
    decoder = build_decoder(model, job, plan, progress.advance, calibration, cache)
    attach(decoder, beside)
    if job.calibration.tune:
        progress.stage("tune")
    tuning = tune_decoder(asked, job, decoder, calibration, progress.advance)
    return Quantized(asked, job, plan, measured, calibration, tuning, decoder)


def quantized_again(
    before: Quantized, job: Job, tokenizer: Path, progress: Progress, cache: WeightCache | None
) -> Quantized:
    """Quantize once more by another job of the same formats and text; see `quantize`.

    Args:
        before: What was made.
        job: As its job, with weights that are read otherwise.
        tokenizer: See `quantize`.
        progress: See `quantize`.
        cache: See `quantize`.
    """
    found = quantize(before.model, job, tokenizer, progress, cache, before.plan, before.calibration)
    return replace(found, measured=before.measured)


def as_asked(model: Model, job: Job, progress: Progress) -> Model:
    """Return `model`, expanded where it is quantized and `job` chooses codes all the same."""
    formats = quantized_in(model.checkpoint)
    if formats is None or keeps_codes(job):
        return model
    progress.note(
        f"{len(model.checkpoint.quantized())} matrices that the checkpoint holds quantized "
        f"({formats}) are expanded and treated as any others: "
        "the errors of both roundings add up. Without --bits, --scheme, --size, --plan, --pt2e, "
        "--calibrate and --rotate they are taken as they are."
    )
    return model.expanded()


def with_adapters(
    model: Model, job: Job, progress: Progress
) -> tuple[Model, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Return `model` without what is to be kept beside its matrices, and that; see `low_rank`.

    Raises:
        UnsupportedError: it has no adapter that can be, or its weights are to be changed.
    """
    if job.weights.adapters == "merged":
        return model, {}
    if job.weights.residual_shift:
        raise UnsupportedError(
            f"--residual-shift {job.weights.residual_shift} changes matrices whose adapters "
            "--adapters beside leaves as they are; give --adapters merged."
        )
    base, found, merged = model.adapters_beside()
    rest = f"; those of {merged} others are merged" if merged else ""
    progress.note(f"The adapter's products are kept beside {len(found)} matrices{rest}.")
    return base, found


def _tell_of_the_import(progress: Progress, report: ImportReport | None) -> None:
    if report is not None:
        progress.note(
            f"{report.matrices} matrices are taken as the checkpoint quantized them "
            f"({report.format}): {report.sentence}."
        )


def _tell_of_the_head(progress: Progress, model: Model, job: Job, plan: QuantizationPlan) -> None:
    claimed = model.checkpoint.config.get("tie_word_embeddings")
    if claimed and not model.spec.tie_word_embeddings:
        progress.note(
            "config.json ties the head to the token table, but the checkpoint holds another head: "
            "it is read, and stored separately."
        )
    if plan.untied_bytes:
        differ = f"its format ({plan.lm_head.label}, {plan.embedding.label})"
        if plan.lm_head == plan.embedding:
            differ = f"the gain of the last norm, which --rotate {job.weights.rotate} moves into it"
        progress.note(
            f"The head shares its weights with the token table but not {differ}: storing it "
            f"separately costs {plan.untied_bytes:,} bytes."
        )


def build_decoder(
    model: Model,
    job: Job,
    plan: QuantizationPlan,
    on_progress: Callable[[float], None] = lambda _: None,
    calibration: CalibrationText | None = None,
    cache: WeightCache | None = None,
) -> Decoder:
    """Build the quantized decoder of an export.

    Args:
        model: What to quantize.
        job: Settings.
        plan: Schemes.
        on_progress: Called with the share done, 0 to 1.
        calibration: The text that `job` asks for, see `read_calibration`.
        cache: Where quantized weights are looked up and kept.

    Raises:
        CheckpointError: a tensor is not finite, or does not fit the precision.
        UnsupportedError: a family that cannot be rotated.
    """
    if (job.calibration.calibrate is None) != (calibration is None):
        raise ValueError("a calibration text and settings that ask for one belong together")
    weights, spec = as_stored(model, job)
    shapes = job.shapes
    decoder = Decoder(
        spec,
        shapes.context,
        job.attention,
        job.logits,
        shapes.spare,
        shapes.longest,
        job.head,
        shapes.multiple,
        job.operations,
    )
    storage = torch.float16 if job.precision.bits == 16 else torch.float32
    take_form(decoder, job.norm, storage)
    for buffer in decoder.buffers():
        # Tables and numbers too are what the program holds, so that only activations differ.
        if buffer.is_floating_point():
            buffer.copy_(buffer.to(storage))
    windows = None if calibration is None else calibration.windows
    if job.weights.pt2e == "none":
        base = job.weights.codes_of
        kept = None if base is None else KeptCodes(base)
        fill(decoder, weights, plan, storage, on_progress, windows, cache, kept)
        return decoder.eval()
    # Imported here: it brings coremltools.
    from llm_coreml.quantize.pt2e import pt2e_static, pt2e_weights

    tables = replace(plan, linear=Unquantized(job.precision.bits))
    fill(decoder, weights, tables, storage, on_progress, None, cache)
    if windows is None:
        pt2e_weights(decoder.eval())
    else:
        pt2e_static(decoder.eval(), windows)
    return decoder


def as_stored(model: Model, job: Job) -> tuple[Weights, DecoderSpec]:
    """Return the weights that are quantized, and the spec with which they are the model.

    Raises:
        UnsupportedError: a family that cannot be rotated or shifted.
    """
    weights, spec = rotated(model.weights, model.spec, job.weights.rotate)
    return shifted(weights, spec, job.weights.residual_shift or 0)


def tune_decoder(
    model: Model,
    job: Job,
    decoder: Decoder,
    calibration: CalibrationText | None,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Tuning | None:
    """Tune a decoder that `build_decoder` calibrated, if `job` asks for it; see `tune`.

    Args:
        model: The original, which is held beside it.
        job: Settings.
        decoder: Changed in place.
        calibration: The text that it was calibrated on.
        on_progress: Called with the share done, 0 to 1.

    Raises:
        CheckpointError: the divergence is not finite.
        UnsupportedError: a linear layer is not quantized.
    """
    if not job.calibration.tune or calibration is None:
        return None
    teacher, rank = build_original(model, decoder.context), job.calibration.recovery_rank
    if rank:
        weights, _ = as_stored(model, job)
        attach(decoder, residual_factors(decoder, weights, rank))
    steps = job.calibration.tune
    return tune(decoder, teacher, calibration.windows, steps, on_progress, recover=bool(rank))


def check_files(config: ExportConfig) -> None:
    """Refuse files that cannot be used, before any work is done.

    Raises:
        LlmCoreMLError: the text of a calibration, or the export whose codes are to be kept.
    """
    if config.calibrate is not None:
        read_content(config.calibrate)
    if config.codes_of is not None:
        KeptCodes(config.codes_of)


def read_calibration(
    job: Job, tokenizer: Path, sha256: str | None = None
) -> CalibrationText | None:
    """Return the text that `job` asks to calibrate on, None if it does not.

    Args:
        job: Settings.
        tokenizer: The model's `tokenizer.json`, which may be absent.
        sha256: The hash that the text is known by; None takes any.

    Raises:
        ConfigError: the text cannot be used or is another, or there is no tokenizer to read it.
    """
    source, tokens = job.calibration.calibrate, job.calibration.calibration_tokens
    if source is None:
        return None
    text = tokenize(source, read_content(source), tokenizer, tokens, job.shapes.context)
    if sha256 not in (None, text.sha256):
        raise ConfigError(f"'{source}' holds another text than at the export.")
    return text


def build_original(model: Model, context: int) -> Decoder:
    """Build the unquantized decoder, its weights held as the checkpoint stores them."""
    decoder = Decoder(model.spec, context)
    fill(decoder, model.weights, plan=None, storage=None)
    return decoder.eval()
