"""Measure a bundle: the file itself, beside the model that it came from.

result = evaluate("out/")                      # the bundled text, the manifest's source
result = evaluate("out/", model=live_model)    # a model that is not on disk
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import (
    RESULTS,
    Bundle,
    open_bundle,
)
from llm_coreml.bundle.seal import file_sha256
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.config.values import checked_count
from llm_coreml.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    LlmCoreMLError,
    UnsupportedError,
)
from llm_coreml.eval.devices import devices_of
from llm_coreml.eval.heldout import read_windows
from llm_coreml.eval.latency import measure_latency
from llm_coreml.eval.metrics import METRICS, Metric
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.results import Evaluation
from llm_coreml.eval.sizes import measure_bytes
from llm_coreml.model import Model, open_model
from llm_coreml.output import check_writable, write_json
from llm_coreml.progress import Progress, Silent
from llm_coreml.quantize.calibrate.text import BUNDLED_TEXT
from llm_coreml.quantize.plan.choose import plan_of
from llm_coreml.quantize.quantized import (
    Quantized,
    build_original,
    quantize,
    read_calibration,
)
from llm_coreml.recipes import bundled_model
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.reference import DECLARED
from llm_coreml.runtime.runner import Runner

DEFAULT_TOKENS = 2048


def evaluate(
    bundle: str | Path,
    *,
    model: str | Path | torch.nn.Module | None = None,
    text: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    artifact_only: bool = False,
    metrics: Sequence[Metric] = METRICS,
    execution: Execution = DECLARED,
    checked: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the artifact and write `results.json` beside it.

    Args:
        bundle: Folder that an export wrote.
        model: The original, where the manifest's source is not at hand (a live model, say).
        text: UTF-8 file; None takes the held-out text that ships in the package.
        tokens: Most tokens to score. A `last` program is fed one at a time.
        artifact_only: Leave out the original and the quantized eager model.
        metrics: What to measure of each model.
        execution: Numerics, device and memory of the reference runtime.
        checked: Refuse files that have changed since the export wrote them.
        progress: Told of stages and shares.

    Raises:
        ArtifactError: the bundle or its program is damaged.
        CheckpointError: the original is absent, or is another model than was exported.
        ConfigError: the text cannot be used, or the execution asks for what is not there.
    """
    checked_count("--tokens", tokens)
    progress = progress or Silent()
    progress.stage("open")
    opened = open_bundle(Path(bundle), checked)
    check_writable(opened.folder, RESULTS)
    artifact = open_runner(opened, execution)
    artifact.check_every_logit()
    tokenizer = opened.tokenizer if opened.tokenizer.is_file() else None
    name, windows = read_windows(text, tokenizer, artifact.context, tokens)
    runners = {} if artifact_only else _originals(opened, model, progress)
    runners["artifact"] = artifact
    progress.stage("score")
    qualities = measure_quality(runners, windows, progress.advance, metrics)
    progress.stage("time")
    result = Evaluation(
        text=name,
        tokens=sum(len(window) - 1 for window in windows),
        window=max(map(len, windows)),
        qualities=qualities,
        latencies=measure_latency(artifact, windows[0], progress.advance),
        bytes=measure_bytes(opened),
        bits_per_weight=opened.manifest.quantization.bits_per_weight,
        source=asdict(opened.manifest.source),
        program_sha256=file_sha256(opened.program),
        mode=execution.mode,
        device=execution.device,
        devices=devices_of(opened),
    )
    write_json(opened.folder / RESULTS, result.to_json())
    return result


def _originals(
    bundle: Bundle, model: str | Path | torch.nn.Module | None, progress: Progress
) -> dict[str, Runner]:
    """Build the unquantized and the quantized eager model of a bundle.

    A calibrated one is calibrated again, and left out where the text is not at hand.
    """
    family = _family_of(bundle)
    opened = _open_original(bundle) if model is None else open_model(model, family=family)
    if opened.sha256() != bundle.manifest.source.sha256:
        raise CheckpointError(
            f"'{opened.source.name}' holds other weights than were exported; give the original "
            "with --model, or measure with --artifact-only."
        )
    context = bundle.manifest.program.context
    runners = {"original": EagerRunner(build_original(opened, context), "PyTorch eager fp32")}
    quantized = _quantized(bundle, opened, progress)
    if quantized is not None:
        runners["quantized"] = EagerRunner(quantized.decoder, "PyTorch eager fp32")
    return dict(runners)


def _open_original(bundle: Bundle) -> Model:
    """Open what the manifest names, a folder from here or else beside the bundle.

    Of several folders the one with the weights that were exported is taken.
    """
    source = bundle.manifest.source
    remedy = "Give its path with --model, or measure with --artifact-only."
    if source.kind == "live":
        raise CheckpointError(
            "This bundle was exported from a model in memory; give the same model with --model "
            "(a folder where it is saved) or model=, or measure with --artifact-only."
        )
    if source.kind == "bundled":
        return open_model(bundled_model())
    reason = ""
    opened = None
    for place in [source.name] if source.kind == "hub" else _folders(bundle):
        try:
            opened = open_model(place, revision=source.revision, family=_family_of(bundle))
        except LlmCoreMLError as error:
            reason = reason or str(error)
            continue
        if opened.sha256() == source.sha256:
            return opened
    if opened is not None:
        return opened
    reason = reason or (
        f"it was exported from '{source.name}', of which a manifest tells the name alone, and "
        "there is none in the folder that this runs in, nor beside the bundle."
    )
    raise CheckpointError(f"The original is not at hand: {reason} {remedy}")


def _family_of(bundle: Bundle) -> str | None:
    """Return what the model was read as, None for its own family."""
    settings = bundle.manifest.config.get("source")
    return settings.get("family") if isinstance(settings, Mapping) else None


def _folders(bundle: Bundle) -> list[Path]:
    """Return where the folder or file may be that a bundle was exported from, if it is there."""
    name = Path(os.path.expanduser(bundle.manifest.source.name))
    beside = bundle.folder.resolve().parent
    # An absolute name is itself wherever it is looked for.
    places = dict.fromkeys((name, beside / name, beside / name.name))
    return [place for place in places if os.path.exists(place)]


def _with_text(bundle: Bundle, config: ExportConfig) -> ExportConfig:
    """Say where the text of the calibration is: a manifest has the name of its file alone."""
    text = config.calibrate
    if text is None or text == BUNDLED_TEXT or os.path.exists(text):
        return config
    return replace(config, calibrate=str(bundle.folder.resolve().parent / text))


def _quantized(bundle: Bundle, model: Model, progress: Progress) -> Quantized | None:
    """Quantize a bundle's original again; None where the text of its calibration is not at hand."""
    try:
        config = ExportConfig.from_json(bundle.manifest.config)
        job = resolve(_with_text(bundle, config), model.spec)
        plan = plan_of(bundle.manifest.plan_json(), job, model.spec)
    except (ConfigError, UnsupportedError) as error:
        raise ArtifactError(
            f"The manifest of '{bundle.folder}' does not fit its model: {error} Export again, or "
            "measure with --artifact-only."
        ) from None
    calibration = bundle.manifest.quantization.calibration
    sha256 = None if calibration is None else calibration.sha256
    try:
        text = read_calibration(job, bundle.tokenizer, sha256)
    except ConfigError as error:
        progress.note(
            f"The quantized model is left out, for it is to be calibrated again: {error} The text "
            "is looked for in the folder that this runs in, and beside the bundle."
        )
        return None
    return quantize(model, job, bundle.tokenizer, Silent(), plan=plan, calibration=text)
