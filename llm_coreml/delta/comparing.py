"""How near base and delta together are to what they stand for, by programs that are run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llm_coreml.bundle.bundle_runner import open_runner
from llm_coreml.bundle.folder import Bundle
from llm_coreml.delta.delta_record import Measured
from llm_coreml.errors import GateError, UnmeasuredError
from llm_coreml.eval.heldout import read_windows
from llm_coreml.eval.metrics import METRICS
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.whole_rows import whole_rows
from llm_coreml.progress import Progress
from llm_coreml.runtime.runner import Runner


def measure(
    result: Bundle,
    base: Bundle,
    reference: Runner,
    text: str | Path | None,
    tokens: int,
    progress: Progress,
) -> Measured | None:
    """Measure a bundle that was made of base and delta, beside the base alone.

    Args:
        result: What was made.
        base: What it was made of.
        reference: What both are compared with.
        text: UTF-8 file; None takes the held-out text, and random tokens without a tokenizer.
        tokens: Most tokens to score.
        progress: Told of the share done.

    Returns:
        None where a program does not give every logit.
    """
    artifact, before = open_runner(result), open_runner(base)
    if any(runner.head.count is not None for runner in (artifact, before, reference)):
        return None
    name, windows = _windows(result, text, artifact, tokens)
    runners: dict[str, Runner] = {"original": reference, "artifact": artifact}
    if before.vocab_size == artifact.vocab_size:
        runners["base"] = before
    readers = {
        key: whole_rows(runner, windows[0], progress.note) for key, runner in runners.items()
    }
    asked = [metric for metric in METRICS if metric.name in ("mean_kl", "top1_agreement")]
    found = {each.name: each for each in measure_quality(readers, windows, progress.advance, asked)}
    return Measured(
        text=name,
        tokens=sum(len(window) - 1 for window in windows),
        reference=reference.label,
        mean_kl=found["artifact"].mean_kl,
        top1_agreement=found["artifact"].top1_agreement,
        base_mean_kl=found["base"].mean_kl if "base" in found else None,
    )


def hold_to(measured: Measured | None, max_kl: float | None) -> None:
    """Hold what was measured to the gate of `--max-kl`.

    Raises:
        GateError: the divergence is larger, or no number.
        UnmeasuredError: there is none.
    """
    if max_kl is None:
        return
    if measured is None:
        raise UnmeasuredError(
            "--max-kl asks for the divergence of base and delta, whose program gives no logits to "
            "compare; leave it out, or export with --head logits."
        )
    found = measured.mean_kl
    if found is None or not found <= max_kl:
        told = "no number" if found is None else f"{found:.5f} nats"
        raise GateError(
            f"The gate is not held: the mean KL of base and delta from {measured.reference} is "
            f"{told}, and --max-kl asks for {max_kl:.5f} at most. Nothing was written."
        )


def _windows(
    bundle: Bundle, text: str | Path | None, runner: Runner, tokens: int
) -> tuple[str, Sequence[Sequence[int]]]:
    if text is not None or bundle.tokenizer.is_file():
        tokenizer = bundle.tokenizer if bundle.tokenizer.is_file() else None
        return read_windows(text, tokenizer, runner.context, tokens)
    generator = torch.Generator().manual_seed(0)
    count = min(tokens + 1, runner.context)
    drawn = torch.randint(runner.vocab_size, (count,), generator=generator)
    return "random tokens", [drawn.tolist()]
