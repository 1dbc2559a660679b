"""A metric is one record: whoever adds one touches nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType

import llm_coreml
from fake_runner import FakeRunner
from llm_coreml.cli.tables import comparison_table, evaluation_table
from llm_coreml.eval.difference import Comparison
from llm_coreml.eval.metrics import METRICS, Metric
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.results import Evaluation, Quality
from llm_coreml.eval.timings import Latency

TABLE = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, -1.0], [0.5, 0.0, 0.0]])
WINDOWS = [[0, 1, 2, 0], [2, 1]]

LARGEST = Metric(
    name="largest_logit",
    label="largest logit",
    format=".1f",
    values=lambda read: read.logits.amax(-1),
    compute=lambda values: float(values.max()),
)
MOVED = Metric(
    name="moved",
    label="furthest move",
    format=".1%",
    values=lambda read: (read.logits - read.original).abs().amax(-1),
    compute=lambda values: float(values.max()),
    compares=True,
)


class Uncopied:
    """Computes the least value, and cannot be copied, as an open file or a lock cannot."""

    def __call__(self, values: torch.Tensor) -> float:
        return float(values.min())

    def __deepcopy__(self, memo: object) -> Uncopied:
        raise TypeError("cannot be copied")


def shown(table: RenderableType) -> list[list[str]]:
    """Return a table's lines, cut where two spaces or more part the cells."""
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def read(*metrics: Metric) -> tuple[Quality, ...]:
    runners = {"original": FakeRunner(TABLE), "artifact": FakeRunner(TABLE + torch.eye(3) / 4)}
    return measure_quality(runners, WINDOWS, metrics=(*METRICS, *metrics))


def test_names_and_labels_are_unlike() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert len({metric.label for metric in METRICS}) == len(METRICS)


def test_json_of_a_quality_has_every_metric_in_order() -> None:
    original, artifact = read()
    keys = ["name", "runtime", "perplexity", "mean_kl", "p99_kl", "top1_agreement"]
    assert list(original.to_json()) == list(artifact.to_json()) == keys
    missing = {"mean_kl": None, "p99_kl": None, "top1_agreement": None}
    named = {"name": "original", "runtime": "fake", "perplexity": original.perplexity}
    assert original.to_json() == {**named, **missing}
    assert artifact.to_json()["mean_kl"] == artifact.mean_kl == artifact.figures["mean_kl"]


def test_a_made_up_metric_is_measured_and_compares_only_what_has_an_original() -> None:
    original, artifact = read(LARGEST, MOVED)
    assert original.to_json()["largest_logit"] == 3.0
    assert original.to_json()["moved"] is None and "moved" not in original.figures
    assert artifact.figures["moved"] == pytest.approx(0.25)
    (alone,) = measure_quality({"artifact": FakeRunner(TABLE)}, WINDOWS, metrics=(LARGEST, MOVED))
    assert alone.figures == {"largest_logit": 3.0}


def test_a_made_up_metric_stands_in_results_and_table(
    bundle: Path, checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    result = llm_coreml.evaluate(
        own, model=checkpoint, text=text_file, tokens=9, metrics=(*METRICS, LARGEST, MOVED)
    )
    written = json.loads((own / "results.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    original, quantized, artifact = written["qualities"]
    assert original["moved"] is None and artifact["moved"] > 0
    assert quantized["largest_logit"] == result.quality("quantized").figures["largest_logit"]
    lines = shown(evaluation_table(result))
    assert lines[0][0].endswith("; KL, agreement and move against the original")
    assert lines[1][-2:] == ["largest logit", "furthest move"]
    assert lines[2][-1] == f"{original['largest_logit']:.1f}"
    assert lines[4][-2:] == [f"{artifact['largest_logit']:.1f}", f"{artifact['moved']:.1%}"]
    # Without a metric that compares, nothing is said of the original.
    few = llm_coreml.evaluate(own, text=text_file, tokens=9, artifact_only=True, metrics=(LARGEST,))
    assert shown(evaluation_table(few))[0] == ["9 tokens of tëxt.txt, windows of up to 10"]


def test_a_metric_need_not_be_copied() -> None:
    metric = Metric("least_cost", "least cost", ".2f", lambda read: read.costs, Uncopied())
    result = Evaluation(
        text="text",
        tokens=4,
        window=4,
        qualities=read(metric),
        latencies=(Latency("fake", 1, 0.5, 3),),
        bytes={"model.pte": 7},
        bits_per_weight=4.5,
        source={"kind": "folder"},
        program_sha256="ab",
    )
    written = result.to_json()
    # Nothing is forgotten, and results are read in this order.
    assert list(written) == ["version", *(each.name for each in fields(Evaluation))]
    assert {name: written[name] for name in ("text", "tokens", "window", "bits_per_weight")} == {
        "text": "text",
        "tokens": 4,
        "window": 4,
        "bits_per_weight": 4.5,
    }
    assert (written["mode"], written["device"], written["program_sha256"]) == (
        "declared",
        "cpu",
        "ab",
    )
    assert (written["bytes"], written["source"]) == ({"model.pte": 7}, {"kind": "folder"})
    assert written["qualities"][1]["least_cost"] == result.artifact.figures["least_cost"]
    assert written["latencies"][0]["tokens_per_second"] == 2


def test_a_made_up_metric_stands_in_a_comparison() -> None:
    first, second = read(MOVED)
    found = Comparison(
        programs=("a", "b"), text="words", tokens=5, mode="declared", device="cpu", equal=False,
        paired=7, alone=({}, {}), threshold=0.01, first=None, layers=(),
        qualities=(first, second),
    )  # fmt: skip
    assert [quality["moved"] for quality in found.to_json()["qualities"]] == [None, 0.25]
    *_, head, one, other = shown(comparison_table(found))
    assert head[-1] == "furthest move" and other[0] == "B, against A" and other[-1] == "25.0%"
    assert one == ["A", f"{first.perplexity:.4f}"]
