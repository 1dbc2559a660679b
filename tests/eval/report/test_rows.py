"""Results read for a report: rows, the front, regressions, and what cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llm_coreml.errors import ConfigError
from llm_coreml.eval.failed_cells import failures_in
from llm_coreml.eval.report.charts import charts_of
from llm_coreml.eval.report.rows import collect, facts_of
from llm_coreml.eval.results_file import append_result
from result_documents import document, write_failure


def day(at: int) -> str:
    return f"2026-01-{at:02}T00:00:00Z"


def test_a_row_has_the_figures_of_its_document(tmp_path: Path) -> None:
    append_result(tmp_path, document("out", speed=12.5, size=4000))
    (row,) = collect(tmp_path).rows
    assert (row.name, row.model, row.target) == ("out (int4 group 32, gpu)", "tiny", "gpu")
    assert row.perplexity == pytest.approx(math.exp(2.175)) and row.mean_kl == pytest.approx(0.02)
    assert (row.top1, row.bytes, row.speed) == (pytest.approx(0.9), 4000.0, 12.5)
    assert row.latencies == ((1, 1 / 12.5), (8, 8 / 12.5))
    facts = facts_of(row)
    assert facts["source"] == "folder tiny" and facts["made for"] == "coreml iOS18 fp16"
    assert facts["program (SHA-256)"] == 64 * "0"


def test_files_bundles_and_lines_are_found(tmp_path: Path) -> None:
    append_result(tmp_path, document("line"))
    (tmp_path / "one.json").write_text(json.dumps(document("file"), indent=2))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/results.json").write_text(json.dumps(document("bundle")))
    (tmp_path / "notes.txt").write_text("nothing")
    names = {row.name.split(" ")[0] for row in collect(tmp_path).rows}
    assert names == {"line", "file", "bundle"}
    assert len(collect(tmp_path / "one.json").rows) == 1


def test_the_front_has_what_nothing_beats(tmp_path: Path) -> None:
    for name, nll, size in (("a", 2.0, 100), ("b", 2.1, 90), ("c", 2.2, 95), ("d", 2.0, 101)):
        append_result(tmp_path, document(name, nll=(nll,) * 4, size=size))
    append_result(tmp_path, document("other", nll=(9.0,) * 4, size=500, model="other"))
    front = {row.name[:5].split(" ")[0] for row in collect(tmp_path).rows if row.front}
    assert front == {"a", "b", "other"}


def test_regressions_are_marked_within_a_series(tmp_path: Path) -> None:
    costs = {1: 2.0, 2: 2.005, 3: 2.05, 4: 2.04, 5: 2.1}
    for at in (3, 1, 5, 2, 4):  # as runs land
        append_result(tmp_path, document(f"d{at}", nll=(costs[at],) * 4, created=day(at)))
    append_result(tmp_path, document("ane", nll=(3.0,) * 4, target="ane", created=day(6)))
    found = collect(tmp_path).rows
    assert [row.name.split(" ")[0] for row in found] == ["ane", "d5", "d4", "d3", "d2", "d1"]
    marked = {row.name.split(" ")[0]: row.regression for row in found if row.regression}
    assert marked == {
        "d3": pytest.approx(math.expm1(0.045)),
        "d5": pytest.approx(math.expm1(0.06)),
    }


def test_what_cannot_be_read_is_named_and_left_out(tmp_path: Path) -> None:
    lines: list[Any] = [
        document(),
        {**document(), "version": 1},
        {"version": 2},
        [],
        {**document(), "created": "yesterday"},
        {**document(), "qualities": []},
        {**document(), "latencies": [{"tokens": "x", "seconds": 1}]},
    ]
    text = "\n".join([*map(json.dumps, lines), '{"version": 2', 5000 * "["])
    (tmp_path / "results.jsonl").write_text(text + "\n")
    (tmp_path / "bad.json").write_bytes(b"\xff\x00")
    found = collect(tmp_path)
    assert len(found.rows) == 1 and len(found.problems) == 9
    assert any("line 2 of results.jsonl has version 1" in each for each in found.problems)
    assert all(each.isprintable() and len(each) < 300 for each in found.problems)


def test_figures_that_are_no_numbers_are_not_measured(tmp_path: Path) -> None:
    bad = document()
    bad["qualities"][-1] |= {
        "perplexity": None,
        "mean_kl": math.nan,
        "not_finite": {"rows": 3, "window": 0, "position": 1, "token": 2},
    }
    (tmp_path / "results.jsonl").write_text(json.dumps(bad) + "\n")
    (row,) = collect(tmp_path).rows
    assert row.perplexity is None and row.mean_kl is None
    assert facts_of(row)["no numbers"] == "3 rows of logits hold NaN or inf"


def test_cells_that_failed_are_beside_the_results(tmp_path: Path) -> None:
    write_failure(tmp_path / "cell-1", "a bits 4", "It crashed\n.", "2026-01-01T00:00:00Z")
    write_failure(tmp_path / "cell-2", "a bits 3", "No.", "2026-01-02T00:00:00Z")
    write_failure(tmp_path / "other", "b", "It is no folder of a cell.")
    for at, damaged in enumerate(("{", "[]", '{"outcome": {"state": "failed"}}', 5000 * "[")):
        (tmp_path / f"cell-x{at}").mkdir()
        (tmp_path / f"cell-x{at}/cell.json").write_text(damaged)
    found = collect(tmp_path)
    assert found.rows == () and [each.label for each in found.failures] == ["a bits 3", "a bits 4"]
    assert found.failures[1].sentence == r"It crashed\n." and found.failures[1].exit_code == 5
    assert failures_in(tmp_path / "gone") == []


@pytest.mark.parametrize(("cost", "scale"), [(2.5, None), (9.0, "log")])
def test_perplexities_that_are_far_apart_have_a_scale_for_it(
    tmp_path: Path, cost: float, scale: str | None
) -> None:
    lines = [json.dumps(document(nll=(each,) * 4)) for each in (2.0, cost)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    drawn = {each.name: each.spec["layer"] for each in charts_of(collect(tmp_path).rows)}
    found = [drawn[name][0]["encoding"]["y"]["scale"] for name in ("size", "speed", "history")]
    assert [each.get("type") for each in found] == [scale] * 3


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ConfigError):
            collect(place)
