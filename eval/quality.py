"""Figures of one or more models on the same windows, some of them distances from the first.

All models read a window before any reads the next, so that only one window's logits are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from llm_coreml.eval.metrics import METRICS, Metric, Predictions
from llm_coreml.eval.results import Quality
from llm_coreml.runtime.runner import Runner


def measure_quality(
    runners: Mapping[str, Runner],
    windows: Sequence[Sequence[int]],
    on_progress: Callable[[float], None] = lambda _: None,
    metrics: Sequence[Metric] = METRICS,
) -> tuple[Quality, ...]:
    """Score every window by every runner.

    Args:
        runners: Models by name; those after `original`, if it is among them, are compared to it.
        windows: Token windows; the first token of each is given, the others are scored.
        on_progress: Called with the share done, 0 to 1.
        metrics: What to measure.
    """
    asked = _asked(tuple(runners), metrics)
    values: dict[str, dict[str, list[torch.Tensor]]] = {
        name: {metric.name: [] for metric in asked[name]} for name in runners
    }
    for done, window in enumerate(windows):
        targets = torch.tensor(window[1:])
        original: torch.Tensor | None = None
        for name, runner in runners.items():
            logits = runner.logits(window[:-1])
            if name == "original":
                original = logits
            read = Predictions(logits, targets, logits if original is None else original)
            for metric in asked[name]:
                values[name][metric.name].append(metric.values(read))
        on_progress((done + 1) / len(windows))
    return tuple(
        Quality(
            name=name,
            runtime=runner.label,
            figures={
                metric.name: metric.compute(torch.cat(values[name][metric.name]))
                for metric in asked[name]
            },
            metrics=tuple(metrics),
        )
        for name, runner in runners.items()
    )


def _asked(names: Sequence[str], metrics: Sequence[Metric]) -> dict[str, list[Metric]]:
    """Return what to measure of each model: distances only of those after the original."""
    first = names.index("original") if "original" in names else len(names)
    return {
        name: [metric for metric in metrics if at > first or not metric.compares]
        for at, name in enumerate(names)
    }
