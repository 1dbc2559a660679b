"""The statistics that llama-perplexity prints, by its definitions and under its names.

    found = llama_statistics(nll, base, kl, top1)
    found["Mean KLD"].value, found["Mean KLD"].error

Source: tools/perplexity/perplexity.cpp of llama.cpp, `kl_divergence`. Runs of spaces in a name are
one here. Differences of probability, agreement and correlation are in percent, as printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llm_coreml.eval.measures import Statistic
from llm_coreml.eval.metrics import exp

_TAILS = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)
# Quartiles are printed of differences of probability alone.
_QUARTILES = (75.0, 25.0)
# With fewer tokens it prints no uncertainty.
_FEW = 10


def llama_statistics(
    nll: torch.Tensor, base: torch.Tensor, kl: torch.Tensor, top1: torch.Tensor
) -> dict[str, Statistic]:
    """Return the statistics by name.

    Args:
        nll: Cost of each token in nats, float64 `[tokens]`.
        base: That of the original.
        kl: KL(original || this) of each.
        top1: One where both have the same most likely token, else zero.
    """
    moved = (-nll).exp() - (-base).exp()
    found = {
        **_perplexities(nll, base),
        "Mean KLD": _mean(kl),
        **_percentiles("KLD", kl, 1.0),
        "Mean Δp": _scaled(_mean(moved), 100.0),
        **_percentiles("Δp", moved, 100.0),
        "RMS Δp": _root_mean_square(moved),
        "Same top p": _share(top1),
    }
    # A perplexity may be beyond all numbers.
    return {
        name: item
        for name, item in found.items()
        if math.isfinite(item.value) and math.isfinite(item.error or 0.0)
    }


def _mean(values: torch.Tensor) -> Statistic:
    """Return the mean, and the standard error of it."""
    count, mean = len(values), float(values.mean())
    variance = float((values * values).mean()) - mean * mean
    error = math.sqrt(variance / (count - 1)) if variance > 0 and count > _FEW else 0.0
    return Statistic(mean, error)


def _scaled(found: Statistic, by: float) -> Statistic:
    return Statistic(by * found.value, None if found.error is None else by * found.error)


def _perplexities(nll: torch.Tensor, base: torch.Tensor) -> dict[str, Statistic]:
    ours, theirs, count = _mean(nll), _mean(base), len(nll)
    error, its_error = ours.error or 0.0, theirs.error or 0.0
    covariance = 0.0
    if count >= _FEW:
        covariance = (float((nll * base).mean()) - ours.value * theirs.value) / (count - 1)
    ppl, its_ppl = exp(ours.value), exp(theirs.value)
    spread = error * its_error
    ratio = exp(ours.value - theirs.value)
    ratio_error = math.sqrt(max(0.0, error**2 + its_error**2 - 2 * covariance))
    ppl_error, its_ppl_error = ppl * error, its_ppl * its_error
    difference = ppl_error**2 + its_ppl_error**2 - 2 * ppl * its_ppl * covariance
    return {
        "Mean PPL(Q)": Statistic(ppl, ppl_error),
        "Mean PPL(base)": Statistic(its_ppl, its_ppl_error),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": Statistic(100 * covariance / spread if spread else 0.0),
        "Mean ln(PPL(Q)/PPL(base))": Statistic(ours.value - theirs.value, ratio_error),
        "Mean PPL(Q)/PPL(base)": Statistic(ratio, ratio * ratio_error),
        "Mean PPL(Q)-PPL(base)": Statistic(ppl - its_ppl, math.sqrt(max(0.0, difference))),
    }


def _percentiles(of: str, values: torch.Tensor, scale: float) -> dict[str, Statistic]:
    ordered = values.sort().values
    found = {f"Maximum {of}": Statistic(scale * float(ordered[-1]))}
    for tail in _TAILS:
        if of == "KLD" and tail in _QUARTILES:
            continue
        name = "Median" if tail == 50.0 else f"{tail}%"
        found[f"{name} {of}"] = Statistic(scale * percentile(ordered, tail / 100))
    return {**found, f"Minimum {of}": Statistic(scale * float(ordered[0]))}


def percentile(ordered: torch.Tensor, fraction: float) -> float:
    """Return what so many of the ordered values lie below, between two of them by distance."""
    place = fraction * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    rest = place - below
    return float((1 - rest) * ordered[below] + rest * ordered[above])


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the 90th and the 99th percentile of values in any order."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    return percentile(ordered, 0.5), percentile(ordered, 0.9), percentile(ordered, 0.99)


def _root_mean_square(moved: torch.Tensor) -> Statistic:
    """Return the root of the mean square, its error by the slope of the root."""
    square = _mean(moved * moved)
    root = math.sqrt(square.value)
    error = 0.5 / root * (square.error or 0.0) if root else 0.0
    return Statistic(100 * root, 100 * error)


def _share(top1: torch.Tensor) -> Statistic:
    share, count = float(top1.mean()), len(top1)
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.0
    return Statistic(100 * share, 100 * error)
