"""Figures of one or more models on the same windows, some of them distances from the first.

original, artifact = measure_quality({"original": ..., "artifact": ...}, windows)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from llm_coreml.eval.cores import Share
from llm_coreml.eval.finished import FinishedWindows
from llm_coreml.eval.measuring import measures_of
from llm_coreml.eval.metrics import METRICS, Metric
from llm_coreml.eval.results import Quality, Window
from llm_coreml.eval.window_scores import ModelScores, Reader, packed, score_window, unpacked
from llm_coreml.eval.workers import in_parallel


def measure_quality(
    readers: Mapping[str, Reader],
    windows: Sequence[Sequence[int]],
    on_progress: Callable[[float], None] = lambda _: None,
    metrics: Sequence[Metric] = METRICS,
    sizes: Sequence[Window] | None = None,
    *,
    share: Share | None = None,
    finished: FinishedWindows | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Quality, ...]:
    """Score every window by every model.

    Args:
        readers: Models by name; those after `original`, if it is among them, are compared to it.
        windows: Token windows; the first token of each is given, the others are scored.
        on_progress: Called with the share done of what was left to do, 0 to 1.
        metrics: What to measure.
        sizes: Of the windows, for what goes beyond `metrics`; None leaves that out.
        share: How many windows at a time; None reads one after the other.
        finished: Windows that need not be read again, and where those that are read are kept.
        note: Told how many those are.

    Returns:
        A record for each model. One whose logits hold inf or NaN has no figures.
    """
    asked = _asked(tuple(readers), metrics)
    found = {} if finished is None else _before(finished, windows)
    left = [number for number in range(len(windows)) if number not in found]
    if found:
        note(f"{len(found)} of {len(windows)} windows were scored before, and are not read again.")

    share = share or Share(1, torch.get_num_threads())

    def work(number: int) -> bytes:
        return packed(score_window(readers, windows[number], asked))

    scored = in_parallel(work, left, share.jobs, share.threads)
    for done, (number, data) in enumerate(scored, 1):
        if finished is not None:
            finished.store(windows[number], data)
        found[number] = unpacked(data)
        on_progress(done / len(left))
    ordered = [found[number] for number in range(len(windows))]
    return tuple(
        _quality(name, reader.label, [each[name] for each in ordered], metrics, windows, sizes)
        for name, reader in readers.items()
    )


def _before(
    finished: FinishedWindows, windows: Sequence[Sequence[int]]
) -> dict[int, dict[str, ModelScores]]:
    """Return the scores of the windows that were finished, by number."""
    found = {number: finished.load(window) for number, window in enumerate(windows)}
    return {number: scores for number, scores in found.items() if scores is not None}


def _quality(
    name: str,
    label: str,
    scores: Sequence[ModelScores],
    metrics: Sequence[Metric],
    windows: Sequence[Sequence[int]],
    sizes: Sequence[Window] | None,
) -> Quality:
    columns = {key: [each.columns[key] for each in scores] for key in scores[0].columns}
    measures = measures_of(columns, windows, sizes)
    figures = {}
    if measures is None or measures.not_finite is None:
        by_name = {metric.name: metric for metric in metrics}
        computed = {
            key: by_name[key].compute(torch.cat([each.values[key] for each in scores]))
            for key in scores[0].values
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
