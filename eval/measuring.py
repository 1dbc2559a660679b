"""From the scores of single tokens to measures: figures, intervals, buckets, positions.

    found = measures_of({"nll": [first, second], "finite": [...]}, windows, sizes)

Words and bytes are lm-eval's: its task wikitext divides the cost of a text by the words that white
space parts, and by the bytes of UTF-8, and weighs texts by them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from llm_coreml.eval.bootstrap import interval
from llm_coreml.eval.llama_statistics import llama_statistics, percentile
from llm_coreml.eval.measures import Bucket, Measures, NotFinite, Stretch
from llm_coreml.eval.metrics import exp
from llm_coreml.eval.results import Window

Columns = Mapping[str, Sequence[torch.Tensor]]
Function = Callable[[float], float]

_BUCKETS = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_STRETCHES = 8
# Names of columns as results have them, where a mean over a window is kept.
_KEPT = ("nll", "kl", "top1", "top5")


def measures_of(
    columns: Columns, windows: Sequence[Sequence[int]], sizes: Sequence[Window] | None
) -> Measures | None:
    """Return what follows from the scores of a model's tokens.

    Args:
        columns: Scores of each window by name, see `token_scores.score`.
        windows: The tokens.
        sizes: What each window scores; None asks for nothing but whether all is finite.

    Returns:
        None if nothing was asked for and all is finite.
    """
    broken = _not_finite(columns["finite"], windows)
    if broken is not None:
        return Measures(not_finite=broken)
    if sizes is None:
        return None
    nll = torch.cat(list(columns["nll"]))
    figures, intervals = _costs(columns["nll"], sizes)
    per_window = {name: _means(columns[name]) for name in _KEPT if name in columns}
    if "kl" not in columns:
        stretches = _stretches(columns["nll"], None)
        return Measures(figures, intervals, per_window, positions=stretches)
    base, kl, top1, top5 = (torch.cat(list(columns[n])) for n in ("base", "kl", "top1", "top5"))
    moved = [(-a).exp() - (-b).exp() for a, b in zip(columns["nll"], columns["base"], strict=True)]
    per_window["dp"] = _means(moved)
    every = torch.cat(moved)
    ordered = kl.sort().values
    figures |= {
        "median_kl": percentile(ordered, 0.5),
        "max_kl": float(ordered[-1]),
        "top5_agreement": float(top5.mean()),
        "mean_dp": float(every.mean()),
        "rms_dp": math.sqrt(float((every * every).mean())),
    }
    if len(sizes) > 1:
        intervals |= _intervals_of_distances(columns, moved)
    return Measures(
        figures,
        intervals,
        per_window,
        statistics=llama_statistics(nll, base, kl, top1),
        buckets=_buckets(torch.cat(list(columns["confidence"])), kl, top1),
        positions=_stretches(columns["nll"], columns["kl"]),
    )


def _not_finite(
    finite: Sequence[torch.Tensor], windows: Sequence[Sequence[int]]
) -> NotFinite | None:
    rows = sum(int((column == 0).sum()) for column in finite)
    for number, column in enumerate(finite):
        places = (column == 0).nonzero()
        if len(places):
            position = int(places[0])
            return NotFinite(rows, number, position, windows[number][position])
    return None


def _means(column: Sequence[torch.Tensor]) -> tuple[float, ...]:
    return tuple(float(values.mean()) for values in column)


def _costs(
    nll: Sequence[torch.Tensor], sizes: Sequence[Window]
) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """Return perplexities and bits, and the interval of each."""
    sums = [float(values.sum()) for values in nll]
    counts: dict[str, tuple[list[float], Function]] = {
        "perplexity": ([float(size.tokens) for size in sizes], exp),
        "word_perplexity": ([float(size.words) for size in sizes], exp),
        "byte_perplexity": ([float(size.bytes) for size in sizes], exp),
        "bits_per_byte": ([float(size.bytes) for size in sizes], lambda cost: cost / math.log(2)),
    }
    figures: dict[str, float] = {}
    intervals: dict[str, tuple[float, ...]] = {}
    for name, (parts, made) in counts.items():
        # Of tokens without a text nobody knows the words; and a piece of a text may end none.
        if not all(parts):
            continue
        value = made(sum(sums) / sum(parts))
        if not math.isfinite(value):
            continue
        figures[name] = value
        if len(sizes) > 1:
            bounds = tuple(made(bound) for bound in interval(sums, parts))
            if all(map(math.isfinite, bounds)):
                intervals[name] = bounds
    figures.pop("perplexity", None)  # one of `METRICS`
    return figures, intervals


def _intervals_of_distances(
    columns: Columns, moved: Sequence[torch.Tensor]
) -> dict[str, tuple[float, ...]]:
    counts = [float(len(values)) for values in moved]
    named = {
        "mean_kl": columns["kl"],
        "top1_agreement": columns["top1"],
        "top5_agreement": columns["top5"],
        "mean_dp": moved,
    }
    return {
        name: interval([float(values.sum()) for values in column], counts)
        for name, column in named.items()
    }


def _buckets(confidence: torch.Tensor, kl: torch.Tensor, top1: torch.Tensor) -> tuple[Bucket, ...]:
    """Return what is known of tokens by how sure the original was; the last holds certainty."""
    found = []
    for low, high in itertools.pairwise(_BUCKETS):
        inside = (confidence >= low) & ((confidence < high) | (high == _BUCKETS[-1]))
        count = int(inside.sum())
        found.append(
            Bucket(
                low,
                high,
                count / len(kl),
                count,
                float(kl[inside].mean()) if count else None,
                float(top1[inside].mean()) if count else None,
            )
        )
    return tuple(found)


def _stretches(
    nll: Sequence[torch.Tensor], kl: Sequence[torch.Tensor] | None
) -> tuple[Stretch, ...]:
    """Return means by position in the window, in a few stretches."""
    longest = max(map(len, nll))
    step = -(-longest // _STRETCHES)
    found = []
    for first in range(0, longest, step):
        costs = torch.cat([values[first : first + step] for values in nll])
        distances = None if kl is None else torch.cat([v[first : first + step] for v in kl])
        found.append(
            Stretch(
                first,
                min(first + step, longest) - 1,
                len(costs),
                float(costs.mean()),
                None if distances is None else float(distances.mean()),
            )
        )
    return tuple(found)
