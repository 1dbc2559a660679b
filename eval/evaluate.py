"""Measure an export, or a model: the thing itself, beside the model that it came from.

result = evaluate("out/")                      # the bundled text, the manifest's source
result = evaluate("out/", model=live_model)    # a model that is not on disk
result = evaluate("meta-llama/Llama-3.2-1B")   # an original
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_coreml.bundle.folder import RESULTS, Bundle
from llm_coreml.config.values import checked_count
from llm_coreml.errors import ConfigError
from llm_coreml.eval.devices import devices_of
from llm_coreml.eval.heldout import HeldOut, read_heldout
from llm_coreml.eval.kept import Kept
from llm_coreml.eval.latency import measure_latency
from llm_coreml.eval.measurable import Choice, Measurable, open_measurable
from llm_coreml.eval.metrics import METRICS, Metric
from llm_coreml.eval.response import measure_response
from llm_coreml.eval.results import Evaluation, Export, Quality
from llm_coreml.eval.results_file import append_result, check_results_folder
from llm_coreml.eval.runtimes import AUTO, RUNTIMES
from llm_coreml.eval.scoring import Scoring
from llm_coreml.eval.surroundings import now, this_machine, this_tool
from llm_coreml.output import write_json
from llm_coreml.progress import Progress
from llm_coreml.progress_bar import EVALUATION, Step, listening
from llm_coreml.quantize.cache import default_folder
from llm_coreml.quiet import quiet
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED

DEFAULT_TOKENS = 2048


@quiet()
def evaluate(
    subject: str | Path | torch.nn.Module,
    tokenizer: Any = None,
    *,
    model: str | Path | torch.nn.Module | None = None,
    text: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    artifact_only: bool = False,
    metrics: Sequence[Metric] = METRICS,
    runtime: str = AUTO,
    execution: Execution = DECLARED,
    checked: bool = True,
    results: str | Path | None = None,
    cache: str | Path | bool = True,
    jobs: int | None = None,
    progress: Progress | bool | Callable[[Step], object] | None = None,
) -> Evaluation:
    """Measure something, and write `results.json` beside it if it is a bundle.

    Args:
        subject: A bundle, a `.pte`, a `.mlpackage`; or a model, which is measured in PyTorch: a
            folder, a hub id or a live one.
        tokenizer: Of a live model; else a `tokenizer.json`, or its folder, of what has none.
        model: The original, where the manifest's source is not at hand (a live model, say), or
            where there is no manifest.
        text: UTF-8 file; None takes the held-out text that ships in the package.
        tokens: Most tokens to score.
        artifact_only: Leave out the original and the quantized eager model.
        metrics: What to measure of each model.
        runtime: One of `runtimes.RUNTIMES`; see `bundle_runner`.
        execution: Numerics, device and memory of the reference runtime.
        checked: Refuse files that have changed since the export wrote them.
        results: Folder to whose lines the results are appended, too, see `append_result`.
        cache: Folder that keeps what the original makes of a text, and windows that were scored
            before an interruption; True takes `default_folder()`, False keeps nothing.
        jobs: Windows to read at a time; None takes as many as cores and memory allow.
        progress: Told of stages, shares and notes: True draws one bar, a function is called with
            each `progress_bar.Step`, None and False are silent.

    Raises:
        LlmCoreMLError: see `errors`: something is damaged, absent or another model; the text cannot
            be used; or the results cannot be written, which is known before.
    """
    _check(tokens, jobs, runtime)
    choice = Choice(model, tokenizer, runtime, execution, checked, artifact_only)
    with listening(progress, EVALUATION) as listener:
        listener.stage("open")
        if results is not None:
            check_results_folder(Path(results))
        with open_measurable(subject, choice, listener) as opened:
            opened.runner.check_every_logit()
            read = read_heldout(text, opened.tokenizer, opened.runner.context, tokens)
            scoring = Scoring(read, metrics, _kept(cache, listener), jobs, execution)
            found = scoring.measure(opened, listener)
            result = _evaluation(opened, read, found, execution, listener)
        _write(result, opened.bundle, results)
        scoring.forget()
    return result


def _check(tokens: int, jobs: int | None, runtime: str) -> None:
    checked_count("--tokens", tokens)
    if jobs is not None:
        checked_count("--jobs", jobs)
    if runtime not in RUNTIMES:
        raise ConfigError(f"--runtime '{runtime}' is none; use {', '.join(RUNTIMES)}.")


def _write(result: Evaluation, bundle: Bundle | None, results: str | Path | None) -> None:
    written = result.to_json()
    if bundle is not None:
        write_json(bundle.folder / RESULTS, written)
    if results is not None:
        append_result(Path(results), written)


def _kept(cache: str | Path | bool, progress: Progress) -> Kept | None:
    """Return where an evaluation keeps what it need not make again."""
    if cache is False:
        return None
    folder = default_folder() if cache is True else Path(cache)
    return Kept(folder / "evaluations", progress.note)


def _evaluation(
    opened: Measurable,
    read: HeldOut,
    qualities: tuple[Quality, ...],
    execution: Execution,
    progress: Progress,
) -> Evaluation:
    """Return what was measured, with the times of calls and what a bundle tells of itself."""
    progress.stage("time")
    latencies = measure_latency(opened.runner, read.windows[0], progress.advance)
    bundle = opened.bundle
    return Evaluation(
        text=read.name,
        tokens=read.tokens,
        window=max(map(len, read.windows)),
        qualities=qualities,
        latencies=latencies,
        latency=measure_response(opened.runner, opened.load_seconds, read.windows[0]),
        bytes=opened.sizes,
        bits_per_weight=None if bundle is None else bundle.manifest.quantization.bits_per_weight,
        source=opened.source,
        program_sha256=opened.program_sha256,
        mode=execution.mode,
        device=execution.device,
        devices=() if bundle is None else devices_of(bundle, progress),
        subject=opened.subject,
        export=None if bundle is None else _export(bundle),
        program_bytes=opened.program_bytes,
        bits_per_weight_parts=None if bundle is None else _parts(bundle),
        text_sha256=read.sha256,
        words=sum(size.words for size in read.sizes),
        text_bytes=sum(size.bytes for size in read.sizes),
        windows=read.sizes,
        created=now(),
        tool=this_tool(),
        machine=this_machine(),
    )


def _parts(bundle: Bundle) -> dict[str, float]:
    """Return bits per weight by the kind of matrix."""
    quantization = bundle.manifest.quantization
    return {
        "linear": quantization.linear.bits_per_weight,
        "embedding": quantization.embedding.bits_per_weight,
        "lm_head": quantization.lm_head.bits_per_weight,
    }


def _export(bundle: Bundle) -> Export:
    """Return how a bundle was exported."""
    manifest = bundle.manifest
    quantization, target, description = manifest.quantization, manifest.target, manifest.description
    return Export(
        format=quantization.linear.label,
        scheme=quantization.linear.scheme,
        bits=quantization.linear.bits,
        embedding_format=quantization.embedding.label,
        head_format=quantization.lm_head.label,
        calibrated=quantization.calibration is not None,
        target=target.name,
        backend=target.backend,
        minimum_os=target.minimum_os,
        compute_precision=target.compute_precision,
        logits="all" if description.every_row else "last",
        context=manifest.program.context,
        seq_lengths=tuple(description.seq_lengths),
        manifest_checksum=manifest.checksum,
    )
