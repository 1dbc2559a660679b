"""Results beside each other: what differs, by how much, and what is more than noise.

found = compare([read_result(Path("a")), read_result(Path("b"))])
found.differences[0].value, found.differences[0].interval, found.differences[0].beyond_noise

Two results of the same text are paired: what differs between them is drawn anew window by window,
the same windows for both, see `bootstrap`. Results of different texts have no differences in
quality.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llm_coreml.errors import ConfigError
from llm_coreml.eval.bootstrap import bounds, drawn

Document = Mapping[str, Any]
Interval = tuple[float, float]

# Every one is beside every other.
MOST = 32


@dataclass(frozen=True)
class Figure:
    """A figure by which results are compared.

    Attributes:
        name: Its key.
        label: Its column in tables.
        format: How tables write it, as `format` takes it.
        higher_is_better: Which of two is the better one.
        of: Takes it from a document; None where it was not measured.
        window: The mean of each window that it is made of; empty if it is none of quality.
        relative: A difference is a share of the first's, not a difference of values.
    """

    name: str
    label: str
    format: str
    higher_is_better: bool
    of: Callable[[Document], float | None]
    window: str = ""
    relative: bool = False


def _quality(name: str) -> Callable[[Document], float | None]:
    def take(document: Document) -> float | None:
        value = document["qualities"][-1].get(name)
        return None if value is None else float(value)

    return take


def _bytes(document: Document) -> float | None:
    value = document.get("program_bytes")
    return None if value is None else float(value)


def tokens_per_second(document: Document) -> float | None:
    """Return tokens per second of decoding, None where it was not timed."""
    timed = document.get("latency") or {}
    found = (timed.get("decode") or {}).get("tokens_per_second")
    if found is None:
        one = [each for each in document.get("latencies") or () if each["tokens"] == 1]
        found = one[0]["tokens_per_second"] if one else None
    return None if found is None else float(found)


FIGURES: tuple[Figure, ...] = (
    Figure("perplexity", "perplexity", ".4f", False, _quality("perplexity"), "nll", relative=True),
    Figure("mean_kl", "mean KL", ".5f", False, _quality("mean_kl"), "kl"),
    Figure("top1_agreement", "top-1", ".2%", True, _quality("top1_agreement"), "top1"),
    Figure("program_bytes", "program bytes", ",.0f", False, _bytes, relative=True),
    Figure("tokens_per_second", "tokens/s", ".2f", True, tokens_per_second, relative=True),
)


@dataclass(frozen=True)
class Difference:
    """How far a figure of one result is from that of another.

    Attributes:
        figure: Its name.
        first: Place of the one, from 0 on.
        second: Place of the other.
        value: The second's less the first's; of some figures as a share of the first's.
        interval: Where it lies in 95 of 100 draws of the text's windows; None where there are no
            windows to draw.
        beyond_noise: The interval is on one side of nothing; None without one.
        better: The second is the better one; None where they are equal.
    """

    figure: str
    first: int
    second: int
    value: float
    interval: Interval | None
    beyond_noise: bool | None
    better: bool | None


@dataclass(frozen=True)
class Compared:
    """Results beside each other.

    Attributes:
        names: What each is called.
        texts: What each was measured on.
        figures: Values by figure, one for each result, None where it was not measured.
        differences: Of every two results, the earlier one first.
        notes: Why there are differences that are not told, a sentence each.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    figures: Mapping[str, tuple[float | None, ...]]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def between(self, first: int, second: int) -> dict[str, Difference]:
        """Return the differences of two results by figure."""
        found = (each for each in self.differences if (each.first, each.second) == (first, second))
        return {each.figure: each for each in found}


def compare(documents: Sequence[Document]) -> Compared:
    """Compare results, each with each.

    Args:
        documents: Of evaluations, as `results.json` holds them.

    Raises:
        ConfigError: fewer than two, or too many.
    """
    if not 2 <= len(documents) <= MOST:
        raise ConfigError(
            f"{len(documents)} results were given; a comparison takes 2 to {MOST}. Give bundles "
            "that were evaluated, or files of results."
        )
    differences, notes = [], []
    for (first, one), (second, other) in itertools.combinations(enumerate(documents), 2):
        if not paired(one, other):
            notes.append(
                f"Results {first + 1} and {second + 1} are of different texts or windows, "
                "so that their quality is not compared."
            )
        for figure in FIGURES:
            found = difference(figure, one, other)
            if found is not None:
                value, interval = found
                differences.append(_judged(figure, first, second, value, interval))
    return Compared(
        names=tuple(map(name_of, documents)),
        texts=tuple(f"{each['text']}, {each['tokens']:,} tokens" for each in documents),
        figures={figure.name: tuple(figure.of(each) for each in documents) for figure in FIGURES},
        differences=tuple(differences),
        notes=tuple(notes),
    )


def name_of(document: Document) -> str:
    """Return what a result is called: its subject, with format and target if it is an export."""
    export = document.get("export") or {}
    told = [str(export[key]) for key in ("format", "target") if export.get(key)]
    told[1:1] = ["calibrated"] if export.get("calibrated") else []
    name = str(document["subject"]["name"])
    return f"{name} ({', '.join(told)})" if told else name


def paired(one: Document, other: Document) -> bool:
    """Say whether two results are of the same text in the same windows."""
    windows = [[each["tokens"] for each in document["windows"]] for document in (one, other)]
    return bool(one["text_sha256"] == other["text_sha256"]) and windows[0] == windows[1]


def difference(
    figure: Figure, one: Document, other: Document
) -> tuple[float, Interval | None] | None:
    """Return by how much a figure of `other` is more than that of `one`, and in which interval.

    Returns:
        None where one of them was not measured, or they cannot be compared.
    """
    values = figure.of(one), figure.of(other)
    if None in values or (figure.window and not paired(one, other)):
        return None
    first, second = (float(value or 0.0) for value in values)
    if figure.relative and first == 0.0:
        return None
    value = second / first - 1.0 if figure.relative else second - first
    return value, _interval(figure, one, other)


def _interval(figure: Figure, one: Document, other: Document) -> Interval | None:
    """Return where the difference lies as the windows of the text are drawn anew."""
    windows = [
        ((document["qualities"][-1].get("per_window") or {}).get(figure.window) or ())
        for document in (one, other)
    ]
    weights = np.array([each["tokens"] for each in one["windows"]], dtype=np.float64)
    if not figure.window or len(weights) < 2 or any(len(each) != len(weights) for each in windows):
        return None
    means = np.array(windows, dtype=np.float64)
    if not np.isfinite(means).all():
        return None
    first, second = drawn([(weights * each, weights) for each in means])
    # A perplexity is the exponent of a mean cost, and their ratio that of a difference.
    return bounds(np.expm1(second - first) if figure.relative else second - first)


def _judged(
    figure: Figure, first: int, second: int, value: float, interval: Interval | None
) -> Difference:
    beyond = None if interval is None else not interval[0] <= 0.0 <= interval[1]
    equal = math.isclose(value, 0.0, abs_tol=1e-12)
    better = None if equal else (value > 0) == figure.higher_is_better
    return Difference(figure.name, first, second, value, interval, beyond, better)
