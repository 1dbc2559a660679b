"""Documents of results as an evaluation writes them, from figures that a test chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHA = 64 * "0"


def document(
    name: str = "out",
    *,
    nll: Sequence[float] = (2.0, 2.2, 2.4, 2.1),
    kl: Sequence[float] | None = (0.01, 0.02, 0.03, 0.02),
    top1: Sequence[float] | None = (0.9, 0.95, 0.85, 0.9),
    tokens: Sequence[int] | None = None,
    text: str = "a text",
    size: int = 1000,
    speed: float | None = 20.0,
    created: str = "2026-01-01T00:00:00Z",
    bits: int = 4,
    target: str = "gpu",
    model: str = "tiny",
    mean_only: bool = False,
) -> dict[str, Any]:
    """Return a document whose windows have these means, and whose figures follow from them."""
    kl, top1 = (None if each is None else np.resize(each, len(nll)) for each in (kl, top1))
    counts = list(tokens or [100] * len(nll))

    def mean(values: Any) -> float | None:
        return None if values is None else float(np.average(values, weights=counts))

    artifact: dict[str, Any] = {
        "name": "artifact",
        "runtime": "reference runtime",
        "perplexity": math.exp(mean(nll) or 0.0),
    }
    if kl is not None and top1 is not None:
        artifact |= {"mean_kl": mean(kl), "top1_agreement": mean(top1)}
    if not mean_only:
        measured = {"nll": nll, "kl": kl, "top1": top1}
        artifact["per_window"] = {k: [*map(float, v)] for k, v in measured.items() if v is not None}
    return {
        "version": 2,
        "created": created,
        "tool": {"name": "llm-coreml", "version": "0.1.0"},
        "machine": {"system": "Linux", "machine": "x86_64", "cores": 2, "memory_bytes": 1 << 34},
        "subject": {"kind": "bundle", "name": name, "sha256": SHA},
        "program_sha256": SHA,
        "source": {"kind": "folder", "name": model, "revision": None, "sha256": SHA},
        "export": {
            "format": f"int{bits} group 32",
            "scheme": f"int{bits}-group",
            "bits": bits,
            "embedding_format": "int8 channel",
            "head_format": "int8 channel",
            "target": target,
            "backend": "coreml",
            "minimum_os": "iOS18",
            "compute_precision": "fp16",
            "logits": "last",
            "context": 64,
            "seq_lengths": [1, 8],
            "calibrated": False,
            "manifest_checksum": None,
        },
        "mode": "declared",
        "device": "cpu",
        "text": text,
        "text_sha256": SHA[:-1] + str(len(text) % 10),
        "tokens": sum(counts),
        "words": sum(counts),
        "text_bytes": 4 * sum(counts),
        "window": max(counts) + 1,
        "windows": [{"tokens": n, "words": n, "bytes": 4 * n} for n in counts],
        "qualities": [artifact],
        "latencies": []
        if speed is None
        else [
            {
                "runtime": "reference runtime",
                "tokens": length,
                "seconds": length / speed,
                "runs": 3,
                "tokens_per_second": speed,
            }
            for length in (1, 8)
        ],
        "latency": None,
        "bytes": {"model.pte": size},
        "program_bytes": size,
        "bits_per_weight": bits + 0.5,
        "bits_per_weight_parts": None,
        "devices": [],
    }


def write_failure(
    place: Path, label: str, sentence: str, created: str = "2026-01-01T00:00:00Z"
) -> None:
    """Write the record of a cell of a sweep that has failed into its folder."""
    outcome = {"state": "failed", "sentence": sentence, "exit_code": 5, "seconds": 1.0}
    place.mkdir()
    record = {"label": label, "created": created, "outcome": outcome}
    (place / "cell.json").write_text(json.dumps(record))
