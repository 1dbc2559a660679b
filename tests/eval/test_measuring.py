"""Measures against their definitions, worked out on logits made by hand."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from fake_runner import FakeRunner
from llm_coreml.eval.bootstrap import interval
from llm_coreml.eval.llama_statistics import llama_statistics
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.results import Quality, Window

SEEN = 7
TABLE = torch.randn(SEEN, SEEN, generator=torch.Generator().manual_seed(3))
OTHER = TABLE + 0.3 * torch.randn(SEEN, SEEN, generator=torch.Generator().manual_seed(4))
WINDOWS = [[0, 1, 2, 3, 4, 5], [6, 5, 4, 2, 2], [1, 0, 6, 6, 3, 2, 1, 0, 5]]
SIZES = (Window(5, 3, 17), Window(4, 2, 9), Window(8, 6, 40))


def qualities(other: torch.Tensor = OTHER) -> tuple[Quality, ...]:
    runners = {"original": FakeRunner(TABLE), "artifact": FakeRunner(other)}
    return measure_quality(runners, WINDOWS, sizes=SIZES)


def by_hand() -> dict[str, np.ndarray]:
    """Return probabilities of every scored token, by numpy in the order of the text."""
    logits = {"base": TABLE.double().numpy(), "q": OTHER.double().numpy()}
    logs = {
        name: table - np.log(np.exp(table).sum(-1, keepdims=True)) for name, table in logits.items()
    }
    pairs = [pair for window in WINDOWS for pair in itertools.pairwise(window)]
    rows, targets = np.array(pairs).T
    p, q = logs["base"][rows], logs["q"][rows]
    at = np.arange(len(rows))
    return {
        "base": -p[at, targets],
        "nll": -q[at, targets],
        "kl": (np.exp(p) * (p - q)).sum(-1),
        "same": p.argmax(-1) == q.argmax(-1),
        "five": np.array([p[n].argmax() in np.argsort(-q[n])[:5] for n in at]),
        "confidence": np.exp(p.max(-1)),
    }


def test_perplexities_are_those_of_lm_eval() -> None:
    found = qualities()[1].to_json()
    cost = by_hand()["nll"].sum()
    assert found["perplexity"] == pytest.approx(math.exp(cost / 17))
    # lm_eval/api/metrics.py: exp(-sum(loglikelihoods) / sum(weights)), and bits by ln 2.
    assert found["word_perplexity"] == pytest.approx(math.exp(cost / 11))
    assert found["byte_perplexity"] == pytest.approx(math.exp(cost / 66))
    assert found["bits_per_byte"] == pytest.approx(cost / 66 / math.log(2))


def test_statistics_are_those_of_llama_perplexity() -> None:
    found, hand = qualities()[1].to_json()["statistics"], by_hand()
    nll, base, kl = hand["nll"], hand["base"], hand["kl"]
    count = len(nll)
    moved = np.exp(-nll) - np.exp(-base)

    def error(values: np.ndarray) -> float:
        return math.sqrt(((values**2).mean() - values.mean() ** 2) / (count - 1))

    shared = ((nll * base).mean() - nll.mean() * base.mean()) / (count - 1)
    ppl, ppl_base = math.exp(nll.mean()), math.exp(base.mean())
    ratio = nll.mean() - base.mean()
    ratio_error = math.sqrt(error(nll) ** 2 + error(base) ** 2 - 2 * shared)
    same = hand["same"].mean()
    golden: dict[str, tuple[float, float | None]] = {
        "Mean PPL(Q)": (ppl, ppl * error(nll)),
        "Mean PPL(base)": (ppl_base, ppl_base * error(base)),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (100 * shared / error(nll) / error(base), None),
        "Mean ln(PPL(Q)/PPL(base))": (ratio, ratio_error),
        "Mean PPL(Q)/PPL(base)": (math.exp(ratio), math.exp(ratio) * ratio_error),
        "Mean PPL(Q)-PPL(base)": (
            ppl - ppl_base,
            math.sqrt(
                (ppl * error(nll)) ** 2
                + (ppl_base * error(base)) ** 2
                - 2 * ppl * ppl_base * shared
            ),
        ),
        "Mean KLD": (kl.mean(), error(kl)),
        "Maximum KLD": (kl.max(), None),
        "Minimum KLD": (kl.min(), None),
        "Mean Δp": (100 * moved.mean(), 100 * error(moved)),
        "Maximum Δp": (100 * moved.max(), None),
        "Minimum Δp": (100 * moved.min(), None),
        "RMS Δp": (
            100 * math.sqrt((moved**2).mean()),
            50 * error(moved**2) / math.sqrt((moved**2).mean()),
        ),
        "Same top p": (100 * same, 100 * math.sqrt(same * (1 - same) / (count - 1))),
    }
    for tail in ("99.9", "99.0", "95.0", "90.0", "10.0", "5.0", "1.0", "0.1"):
        golden[f"{tail}% KLD"] = (np.percentile(kl, float(tail)), None)
        golden[f"{tail}% Δp"] = (100 * np.percentile(moved, float(tail)), None)
    golden["Median KLD"] = (np.median(kl), None)
    golden |= {
        "75.0% Δp": (100 * np.percentile(moved, 75), None),
        "Median Δp": (100 * np.median(moved), None),
        "25.0% Δp": (100 * np.percentile(moved, 25), None),
    }
    assert found.keys() == golden.keys()
    for name, (value, uncertain) in golden.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-6, abs=1e-9), name
        if uncertain is None:
            assert "error" not in found[name], name
        else:
            assert found[name]["error"] == pytest.approx(uncertain, rel=1e-5, abs=1e-9), name


def test_ten_tokens_have_no_uncertainty_as_it_prints_none() -> None:
    nll = torch.linspace(1, 2, 10, dtype=torch.float64)
    found = llama_statistics(nll, nll + 0.1, nll, (nll > 1.5).double())
    assert found["Mean KLD"].error == 0.0 and found["Mean PPL(Q)"].error == 0.0


def test_buckets_positions_and_windows() -> None:
    found, hand = qualities()[1].to_json(), by_hand()
    for bucket in found["buckets"]:
        inside = (hand["confidence"] >= bucket["from"]) & (hand["confidence"] < bucket["to"])
        assert bucket["tokens"] == inside.sum() and bucket["share"] == inside.sum() / 17
        if inside.any():
            assert bucket["mean_kl"] == pytest.approx(hand["kl"][inside].mean(), rel=1e-5)
            assert bucket["top1_agreement"] == pytest.approx(hand["same"][inside].mean())
    assert sum(bucket["tokens"] for bucket in found["buckets"]) == 17
    starts = [0, 5, 9]
    assert found["positions"][0]["tokens"] == 3 and found["positions"][-1]["to"] == 7
    assert found["positions"][0]["nll"] == pytest.approx(hand["nll"][starts].mean())
    assert found["positions"][5]["mean_kl"] == pytest.approx(hand["kl"][9 + 5], rel=1e-5)
    assert found["per_window"]["kl"][1] == pytest.approx(hand["kl"][5:9].mean(), rel=1e-5)
    assert found["top5_agreement"] == pytest.approx(hand["five"].mean())
    assert found["median_kl"] == pytest.approx(np.median(hand["kl"]), rel=1e-5)


def test_the_original_is_compared_with_nothing() -> None:
    found = qualities()[0].to_json()
    assert not found.keys() & {"statistics", "buckets", "max_kl", "top5_agreement"}
    assert set(found["per_window"]) == {"nll"}


def test_intervals_hold_the_mean_and_are_the_same_every_time() -> None:
    found = qualities()[1].to_json()
    for name in ("perplexity", "bits_per_byte", "mean_kl", "top5_agreement"):
        low, high = found["intervals"][name]
        assert low <= found[name] <= high
    assert qualities()[1].to_json() == found
    # Where every window is alike, there is nothing to doubt; drawn windows weigh by their counts.
    assert interval([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0)
    low, high = interval([0.0] * 50 + [1.0] * 50, [1.0] * 100)
    assert low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)
    (alone,) = measure_quality({"artifact": FakeRunner(OTHER)}, WINDOWS[:1], sizes=SIZES[:1])
    assert alone.to_json()["intervals"] == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_named_and_never_averaged(value: float) -> None:
    broken = OTHER.clone()
    broken[4, 1] = value
    original, artifact = qualities(broken)
    assert original.figures["perplexity"] > 0
    found = artifact.to_json()
    # Token 4 is read at position 4 of the first window, and at position 2 of the second.
    assert found["not_finite"] == {"rows": 2, "window": 0, "position": 4, "token": 4}
    assert found["perplexity"] is found["mean_kl"] is found["top1_agreement"] is None
    assert not found.keys() & {"statistics", "buckets", "positions", "bits_per_byte"}
    assert "NaN" not in json.dumps(found) and "Infinity" not in json.dumps(found)


def test_costs_beyond_all_numbers_have_no_perplexity() -> None:
    sure = 2000 * torch.eye(SEEN)
    (found,) = measure_quality(
        {"artifact": FakeRunner(sure)}, [[0, 1, 2]], sizes=(Window(2, 1, 2),)
    )
    assert "word_perplexity" not in found.to_json()
