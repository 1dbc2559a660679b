"""Perplexity of one or more models on the same windows, and their divergence from the first.

All models read a window before any reads the next, so that only one window's logits are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from llm_coreml.eval.results import Quality
from llm_coreml.fidelity import kl_divergence, negative_log_likelihood
from llm_coreml.runtime.runner import Runner


def measure_quality(
    runners: Mapping[str, Runner],
    windows: Sequence[Sequence[int]],
    on_progress: Callable[[float], None] = lambda _: None,
) -> tuple[Quality, ...]:
    """Score every window by every runner.

    Args:
        runners: Models by name; those after `original`, if it is among them, are compared to it.
        windows: Token windows; the first token of each is given, the others are scored.
        on_progress: Called with the share done, 0 to 1.
    """
    costs: dict[str, list[torch.Tensor]] = {name: [] for name in runners}
    divergences: dict[str, list[torch.Tensor]] = {name: [] for name in runners}
    agreements: dict[str, list[torch.Tensor]] = {name: [] for name in runners}
    for done, window in enumerate(windows):
        targets = torch.tensor(window[1:])
        original: torch.Tensor | None = None
        for name, runner in runners.items():
            logits = runner.logits(window[:-1])
            costs[name].append(negative_log_likelihood(logits, targets))
            if name == "original":
                original = logits
            if original is not None:
                divergences[name].append(kl_divergence(original, logits))
                agreements[name].append(original.argmax(-1) == logits.argmax(-1))
        on_progress((done + 1) / len(windows))
    return tuple(
        _quality(name, runner.label, costs[name], divergences[name], agreements[name])
        for name, runner in runners.items()
    )


def _quality(
    name: str,
    runtime: str,
    costs: list[torch.Tensor],
    divergences: list[torch.Tensor],
    agreements: list[torch.Tensor],
) -> Quality:
    perplexity = math.exp(float(torch.cat(costs).mean()))
    if not divergences or name == "original":
        return Quality(name, runtime, perplexity)
    divergence = torch.cat(divergences)
    return Quality(
        name=name,
        runtime=runtime,
        perplexity=perplexity,
        mean_kl=float(divergence.mean()),
        p99_kl=float(divergence.quantile(0.99)),
        top1_agreement=float(torch.cat(agreements).to(torch.float64).mean()),
    )
