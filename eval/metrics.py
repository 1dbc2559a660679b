"""What is measured of a model's predictions: one record for each figure.

A record in `METRICS` is all that a figure needs to be computed, written to `results.json` and
shown in tables. In Python others can be added for one evaluation:

worst = Metric("worst_cost", "worst cost", ".2f", lambda read: read.costs, lambda c: float(c.max()))
evaluate("out/", metrics=(*METRICS, worst)).artifact.figures["worst_cost"]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from llm_coreml.eval.token_scores import score


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model foretold of one window, a row for each token that it was scored on.

    Attributes:
        logits: float `[rows, vocab]`.
        targets: int64 `[rows]`, the tokens that came.
        original: Logits of the original, same shape; where there is none, the model's own, and
            what compares is not asked.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    original: torch.Tensor

    @cached_property
    def scored(self) -> Mapping[str, torch.Tensor]:
        """What is known of each token, float64 `[rows]` by name, see `score`."""
        return score(self.logits, self.targets, None if self.alone else self.original)

    @property
    def alone(self) -> bool:
        """Whether there is no original to compare with."""
        return self.original is self.logits

    @property
    def costs(self) -> torch.Tensor:
        """Cost of each token in nats: float64 `[rows]`."""
        return self.scored["nll"]

    @property
    def divergences(self) -> torch.Tensor:
        """KL(original || this) of each row in nats: float64 `[rows]`."""
        return self.scored["kl"]

    @property
    def agreements(self) -> torch.Tensor:
        """One where both have the same most likely token, else zero: float64 `[rows]`."""
        return self.scored["top1"]


@dataclass(frozen=True)
class Metric:
    """One figure of a model on a text.

    Attributes:
        name: Its key in `results.json`.
        label: Its column in tables; the last word says what it is a figure of.
        format: How tables write the value, as `format` takes it.
        values: What it needs of a window, 1-D; a window's logits are held no longer than that.
        compute: The figure, from the values of all windows in one tensor.
        compares: It is a distance from the original, so there is none without one.
    """

    name: str
    label: str
    format: str
    values: Callable[[Predictions], torch.Tensor]
    compute: Callable[[torch.Tensor], float]
    compares: bool = False

    def shown(self, value: float | None) -> str:
        """Return a value as a table's cell, empty if there is none."""
        return "" if value is None else format(value, self.format)


def mean(values: torch.Tensor) -> float:
    """Return the mean in float64."""
    return float(values.to(torch.float64).mean())


def exp(value: float) -> float:
    """Return e to the `value`, inf where that is beyond all numbers."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


METRICS: tuple[Metric, ...] = (
    Metric(
        name="perplexity",
        label="perplexity",
        format=".4f",
        values=lambda read: read.costs,
        compute=lambda costs: exp(mean(costs)),
    ),
    Metric(
        name="mean_kl",
        label="mean KL",
        format=".5f",
        values=lambda read: read.divergences,
        compute=mean,
        compares=True,
    ),
    Metric(
        name="p99_kl",
        label="p99 KL",
        format=".5f",
        values=lambda read: read.divergences,
        compute=lambda divergences: float(divergences.quantile(0.99)),
        compares=True,
    ),
    Metric(
        name="top1_agreement",
        label="top-1 agreement",
        format=".2%",
        values=lambda read: read.agreements,
        compute=mean,
        compares=True,
    ),
)
