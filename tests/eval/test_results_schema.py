"""What holds results against their schema quickly says what the library with the sentences says."""

from __future__ import annotations

import copy
import random
from typing import Any

from llm_coreml.bundle.strict_json import validator
from llm_coreml.eval.results_file import fits, results_schema
from result_documents import document

ODD = (None, True, 0, -1, 1.0, -0.5, 10**9, "", "x" * 300, [], {}, [{}], {"more": 1}, "eager")


def rich() -> dict[str, Any]:
    """Return a document with something in every field that is a record."""
    found = document()
    spot = {"prompt_tokens": 8, "p50": 0.1, "p90": 0.1, "p99": 0.1, "trials": 2}
    found["latency"] = {
        "runtime": "reference runtime",
        "warmups": 1,
        "trials": 2,
        "load_seconds": 0.5,
        "first_token": [spot],
        "decode": {"tokens": 3, "p50": 0.1, "p90": 0.1, "p99": 0.1, "tokens_per_second": 9.5},
        "peak_memory_bytes": 1 << 30,
    }
    found["qualities"][0] |= {
        "intervals": {"perplexity": [8.0, 9.0]},
        "statistics": {"Mean KLD": {"value": 0.1, "error": 0.01}},
        "buckets": [
            {"from": 0, "to": 0.5, "share": 1, "tokens": 9, "mean_kl": 0.1, "top1_agreement": 1}
        ],
        "positions": [{"from": 0, "to": 9, "tokens": 9, "nll": 0.1, "mean_kl": None}],
        "layers": [{"layer": 0, "error": 0.01}],
        "noise_floor": {"mean_kl": 0.1, "p99_kl": 0.2, "top1_agreement": 1, "tokens": 9},
        "not_finite": {"rows": 1, "window": 0, "position": 3, "token": 7},
    }
    return found


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container with each of its keys."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys:
            found += [(value, key), *places(value[key])]
    return found


def test_both_agree_on_every_change_of_a_document() -> None:
    slow, quick = validator(results_schema()), fits
    assert slow.is_valid(rich()) and quick(rich())
    chosen, verdicts = random.Random(7), []
    for _ in range(700):
        changed = copy.deepcopy(rich())
        holder, key = chosen.choice(places(changed))
        if chosen.random() < 0.2:
            del holder[key]
        elif chosen.random() < 0.1 and isinstance(holder, dict):
            holder["other"] = holder[key]
        else:
            holder[key] = chosen.choice(ODD)
        verdicts.append(quick(changed))
        assert verdicts[-1] == slow.is_valid(changed), (key, holder)
    assert 100 < sum(verdicts) < 600
