"""The models that a bundle came from: the original, and the quantized one before lowering.

runners = originals(open_bundle(Path("out")), None, progress)
runners["original"].logits([1, 42, 7])
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from llm_coreml.bundle.folder import Bundle
from llm_coreml.config import ExportConfig, Job, resolve
from llm_coreml.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    LlmCoreMLError,
    UnsupportedError,
)
from llm_coreml.model import Model, open_model
from llm_coreml.progress import Progress, Silent
from llm_coreml.quantize.calibrate.text import BUNDLED_TEXT
from llm_coreml.quantize.kept_codes import kept_program
from llm_coreml.quantize.plan.choose import plan_of
from llm_coreml.quantize.quantized import (
    Quantized,
    build_original,
    quantize,
    read_calibration,
)
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner

EAGER = "PyTorch eager fp32"


def originals(
    bundle: Bundle, model: str | Path | torch.nn.Module | None, progress: Progress
) -> dict[str, EagerRunner]:
    """Build the unquantized and the quantized eager model of a bundle.

    A calibrated one is calibrated again, and left out where the text is not at hand; so is one that
    has the codes of another export, where that is not.

    Args:
        bundle: What was exported.
        model: The original; None takes what the manifest names.
        progress: Told what is left out.

    Raises:
        ArtifactError: the manifest does not fit its model.
        CheckpointError: the original is absent, or is another model than was exported.
    """
    family = _family_of(bundle)
    opened = _open_original(bundle) if model is None else open_model(model, family=family)
    if opened.sha256() != bundle.manifest.source.sha256:
        raise CheckpointError(
            f"'{opened.source.name}' holds other weights than were exported; give the original "
            "with --model, or measure with --artifact-only."
        )
    context = bundle.manifest.program.context
    runners = {"original": EagerRunner(build_original(opened, context), EAGER)}
    quantized = _quantized(bundle, opened, progress)
    if quantized is not None:
        runners["quantized"] = EagerRunner(quantized.decoder, EAGER)
    return runners


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


def _with_files(bundle: Bundle, config: ExportConfig) -> ExportConfig:
    """Say where text and codes of other exports are: a manifest has their names alone."""

    def found(name: str | None) -> str | None:
        if name is None or name == BUNDLED_TEXT or os.path.exists(name):
            return name
        return str(bundle.folder.resolve().parent / name)

    return replace(config, calibrate=found(config.calibrate), codes_of=found(config.codes_of))


def _check_codes(bundle: Bundle, job: Job) -> None:
    """Refuse codes that are not those that the export kept. Raises ConfigError."""
    kept = job.weights.codes_of
    if kept is not None and kept_program(kept) != bundle.manifest.quantization.codes_of:
        raise ConfigError(f"'{kept}' has another program than the one whose codes were kept.")


def _quantized(bundle: Bundle, model: Model, progress: Progress) -> Quantized | None:
    """Quantize a bundle's original again; None where the text of its calibration is not at hand."""
    try:
        config = ExportConfig.from_json(bundle.manifest.config)
        job = resolve(_with_files(bundle, config), model.spec)
        plan = plan_of(bundle.manifest.plan_json(), job, model.spec)
    except (ConfigError, UnsupportedError) as error:
        raise ArtifactError(
            f"The manifest of '{bundle.folder}' does not fit its model: {error} Export again, or "
            "measure with --artifact-only."
        ) from None
    calibration = bundle.manifest.quantization.calibration
    sha256 = None if calibration is None else calibration.sha256
    told = "it is to be calibrated again: {} The text is"
    try:
        text = read_calibration(job, bundle.tokenizer, sha256)
        told = "it has the codes of another export: {} That one is"
        _check_codes(bundle, job)
    except ConfigError as error:
        progress.note(
            f"The quantized model is left out, for {told.format(error)} looked for in the folder "
            "that this runs in, and beside the bundle."
        )
        return None
    return quantize(model, job, bundle.tokenizer, Silent(), plan=plan, calibration=text)
