"""Figures of one or more models on the same windows, some of them distances from the first.

All models read a window before any reads the next, so that only one window's logits are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from llm_coreml.eval.measuring import measures_of
from llm_coreml.eval.metrics import METRICS, Metric, Predictions
from llm_coreml.eval.results import Quality, Window
from llm_coreml.runtime.runner import Runner

# Of each window, what is known of its tokens, by name.
Columns = dict[str, list[torch.Tensor]]


@dataclass
class _Read:
    """What is kept of a model's predictions.

    Attributes:
        columns: Of each window, see `token_scores.score`.
        values: Of each window, what metrics need.
    """

    columns: Columns = field(default_factory=dict)
    values: Columns = field(default_factory=dict)

    def add(self, read: Predictions, metrics: Sequence[Metric]) -> None:
        for name, column in read.scored.items():
            self.columns.setdefault(name, []).append(column)
        for metric in metrics:
            self.values.setdefault(metric.name, []).append(metric.values(read))


def measure_quality(
    runners: Mapping[str, Runner],
    windows: Sequence[Sequence[int]],
    on_progress: Callable[[float], None] = lambda _: None,
    metrics: Sequence[Metric] = METRICS,
    sizes: Sequence[Window] | None = None,
) -> tuple[Quality, ...]:
    """Score every window by every runner.

    Args:
        runners: Models by name; those after `original`, if it is among them, are compared to it.
        windows: Token windows; the first token of each is given, the others are scored.
        on_progress: Called with the share done, 0 to 1.
        metrics: What to measure.
        sizes: Of the windows, for what goes beyond `metrics`; None leaves that out.

    Returns:
        A record for each model. One whose logits hold inf or NaN has no figures.
    """
    asked = _asked(tuple(runners), metrics)
    found = {name: _Read() for name in runners}
    for done, window in enumerate(windows):
        targets = torch.tensor(window[1:])
        original: torch.Tensor | None = None
        for name, runner in runners.items():
            logits = runner.logits(window[:-1])
            read = Predictions(logits, targets, logits if original is None else original)
            found[name].add(read, asked[name])
            if name == "original":
                original = logits
        on_progress((done + 1) / len(windows))
    return tuple(
        _quality(name, runner.label, found[name], metrics, windows, sizes)
        for name, runner in runners.items()
    )


def _quality(
    name: str,
    label: str,
    read: _Read,
    metrics: Sequence[Metric],
    windows: Sequence[Sequence[int]],
    sizes: Sequence[Window] | None,
) -> Quality:
    measures = measures_of(read.columns, windows, sizes)
    figures = {}
    if measures is None or measures.not_finite is None:
        by_name = {metric.name: metric for metric in metrics}
        computed = {
            key: by_name[key].compute(torch.cat(values)) for key, values in read.values.items()
        }
        # A perplexity may be beyond all numbers, and JSON has none for that.
        figures = {key: value for key, value in computed.items() if math.isfinite(value)}
    return Quality(name, label, figures, tuple(metrics), measures)


def _asked(names: Sequence[str], metrics: Sequence[Metric]) -> dict[str, list[Metric]]:
    """Return what to measure of each model: distances only of those after the original."""
    first = names.index("original") if "original" in names else len(names)
    return {
        name: [metric for metric in metrics if at > first or not metric.compares]
        for at, name in enumerate(names)
    }
