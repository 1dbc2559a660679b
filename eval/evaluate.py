"""Measure a bundle: the file itself, beside the model that it came from.

result = evaluate("out/")                      # the bundled text, the manifest's source
result = evaluate("out/", model=live_model)    # a model that is not on disk
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import PROGRAM, RESULTS, Bundle, open_bundle
from llm_coreml.bundle.seal import file_sha256
from llm_coreml.config.values import checked_count
from llm_coreml.eval.devices import devices_of
from llm_coreml.eval.heldout import HeldOut, read_heldout
from llm_coreml.eval.kept import Kept
from llm_coreml.eval.latency import measure_latency
from llm_coreml.eval.metrics import METRICS, Metric
from llm_coreml.eval.originals import originals
from llm_coreml.eval.response import measure_response
from llm_coreml.eval.results import Evaluation, Export, Quality, Subject
from llm_coreml.eval.results_file import append_result, check_results_folder
from llm_coreml.eval.scoring import Scoring
from llm_coreml.eval.sizes import measure_bytes
from llm_coreml.eval.surroundings import now, this_machine, this_tool
from llm_coreml.eval.timings import Latency, Timing
from llm_coreml.output import check_writable, write_json
from llm_coreml.progress import Progress
from llm_coreml.progress_bar import EVALUATION, Step, listening
from llm_coreml.quantize.cache import default_folder
from llm_coreml.quiet import quiet
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED
from llm_coreml.runtime.runner import Runner

DEFAULT_TOKENS = 2048


@quiet()
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
    results: str | Path | None = None,
    cache: str | Path | bool = True,
    jobs: int | None = None,
    progress: Progress | bool | Callable[[Step], object] | None = None,
) -> Evaluation:
    """Measure the artifact and write `results.json` beside it.

    Args:
        bundle: Folder that an export wrote.
        model: The original, where the manifest's source is not at hand (a live model, say).
        text: UTF-8 file; None takes the held-out text that ships in the package.
        tokens: Most tokens to score.
        artifact_only: Leave out the original and the quantized eager model.
        metrics: What to measure of each model.
        execution: Numerics, device and memory of the reference runtime.
        checked: Refuse files that have changed since the export wrote them.
        results: Folder to whose lines the results are appended, too, see `append_result`.
        cache: Folder that keeps what the original makes of a text, and windows that were scored
            before an interruption; True takes `quantize.cache.default_folder()`, False keeps
            nothing.
        jobs: Windows to read at a time; None takes as many as cores and memory allow. Figures are
            the same whatever it is.
        progress: Told of stages, shares and notes: True draws one bar, a function is called with
            each `progress_bar.Step`, None and False are silent.

    Raises:
        ArtifactError: the bundle or its program is damaged.
        CheckpointError: the original is absent, or is another model than was exported.
        ConfigError: the text cannot be used, or the execution asks for what is not there.
        OutputError: the results cannot be written; they are not measured then.
    """
    checked_count("--tokens", tokens)
    if jobs is not None:
        checked_count("--jobs", jobs)
    kept = _kept(cache)
    with listening(progress, EVALUATION) as listener:
        listener.stage("open")
        opened = _opened(bundle, checked, results)
        artifact, load_seconds = _loaded(opened, execution)
        tokenizer = opened.tokenizer if opened.tokenizer.is_file() else None
        read = read_heldout(text, tokenizer, artifact.context, tokens)
        sources = {} if artifact_only else originals(opened, model, listener)
        scoring = Scoring(read, metrics, kept, jobs, execution)
        found = scoring.measure(sources, artifact, _facts(opened), listener)
        timed = _timed(artifact, read, load_seconds, listener)
        result = _evaluation(opened, read, found, timed, execution, listener)
        _write(result, opened, results)
        scoring.forget()
    return result


def _opened(bundle: str | Path, checked: bool, results: str | Path | None) -> Bundle:
    """Open a bundle, if its results can be written."""
    opened = open_bundle(Path(bundle), checked)
    check_writable(opened.folder, RESULTS)
    if results is not None:
        check_results_folder(Path(results))
    return opened


def _loaded(bundle: Bundle, execution: Execution) -> tuple[Runner, float]:
    """Return what runs the program, and the seconds until it could."""
    begun = time.perf_counter()
    artifact = open_runner(bundle, execution)
    seconds = time.perf_counter() - begun
    artifact.check_every_logit()
    return artifact, seconds


def _timed(
    artifact: Runner, read: HeldOut, load_seconds: float, progress: Progress
) -> tuple[tuple[Latency, ...], Timing]:
    """Return the time of single calls, and of what a user waits for."""
    progress.stage("time")
    latencies = measure_latency(artifact, read.windows[0], progress.advance)
    return latencies, measure_response(artifact, load_seconds, read.windows[0])


def _write(result: Evaluation, bundle: Bundle, results: str | Path | None) -> None:
    written = result.to_json()
    write_json(bundle.folder / RESULTS, written)
    if results is not None:
        append_result(Path(results), written)


def _kept(cache: str | Path | bool) -> Kept | None:
    """Return where an evaluation keeps what it need not make again."""
    if cache is False:
        return None
    folder = default_folder() if cache is True else Path(cache)
    return Kept(folder / "evaluations")


def _facts(bundle: Bundle) -> dict[str, str]:
    """Return what the figures of a bundle's models follow from."""
    return {
        "source": bundle.manifest.source.sha256,
        "program": file_sha256(bundle.program),
        "manifest": json.dumps(bundle.manifest.to_json(), sort_keys=True),
    }


def _evaluation(
    bundle: Bundle,
    read: HeldOut,
    qualities: tuple[Quality, ...],
    timed: tuple[tuple[Latency, ...], Timing],
    execution: Execution,
    progress: Progress,
) -> Evaluation:
    """Return what was measured, with what a bundle tells of itself."""
    quantization = bundle.manifest.quantization
    sizes = measure_bytes(bundle)
    program = file_sha256(bundle.program)
    return Evaluation(
        text=read.name,
        tokens=read.tokens,
        window=max(map(len, read.windows)),
        qualities=qualities,
        latencies=timed[0],
        latency=timed[1],
        bytes=sizes,
        bits_per_weight=quantization.bits_per_weight,
        source=asdict(bundle.manifest.source),
        program_sha256=program,
        mode=execution.mode,
        device=execution.device,
        devices=devices_of(bundle, progress),
        subject=Subject("bundle", bundle.folder.resolve().name, program),
        export=_export(bundle),
        program_bytes=sizes[PROGRAM],
        bits_per_weight_parts={
            "linear": quantization.linear.bits_per_weight,
            "embedding": quantization.embedding.bits_per_weight,
            "lm_head": quantization.lm_head.bits_per_weight,
        },
        text_sha256=read.sha256,
        words=sum(size.words for size in read.sizes),
        text_bytes=sum(size.bytes for size in read.sizes),
        windows=read.sizes,
        created=now(),
        tool=this_tool(),
        machine=this_machine(),
    )


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
