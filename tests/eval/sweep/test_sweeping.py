"""Sweeps by the command line and from Python: what is missing is done, failures are kept."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

import llm_coreml
from exported import Run, in_process
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.eval.failed_cells import failures_in
from llm_coreml.eval.results_file import read_results
from llm_coreml.eval.sweep import identity, local_engine
from llm_coreml.eval.sweep.grid import cells_of
from llm_coreml.eval.sweep.sweep_file import read_sweep
from llm_coreml.eval.sweep.task import Task
from stub_cells import ENTRY


def written(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


def states(run: Run) -> dict[str, str]:
    return {cell["label"]: cell["state"] for cell in json.loads(run.out)["cells"]}


def tried(folder: Path) -> list[str]:
    """Return the labels of the cells that were tried, in the order of their beginning."""
    lines = folder / "tries.jsonl"
    return (
        [json.loads(line)[0] for line in lines.read_text().splitlines()] if lines.exists() else []
    )


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have cells do what the name of their model says, and nothing else."""
    monkeypatch.setattr(identity, "open_model", lambda name, family: name)
    monkeypatch.setattr(identity, "_hashes", lambda name: (name, ""))
    monkeypatch.setattr(identity, "Task", functools.partial(Task, entry=ENTRY))


# Real cells.


@pytest.fixture(scope="module")
def real(checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a sweep with one cell that works and one whose groups do not divide."""
    return written(
        tmp_path_factory.mktemp("real") / "tiny.yaml",
        f"""
        models: ['{checkpoint}']
        formats: [{{bits: 4}}, {{bits: 4, group_size: 24}}]
        settings: {{context: 64, seq_lengths: [1, 8]}}
        evaluate: {{text: '{text_file}', tokens: 80}}
        limits: {{memory: 8GB, minutes: 10, cores: 2}}
        """,
    )


def test_cells_are_made_once_and_failures_are_kept_beside_them(
    real: Path,
    checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = tmp_path / "results"
    call = functools.partial(in_process, capfd, monkeypatch, "sweep")
    plan = call(real, "-o", results, "--dry-run", "--format", "json")
    assert plan.code == 0 and not results.exists()
    good, bad = states(plan)
    assert set(states(plan).values()) == {"missing"} and bad.endswith("bits 4 group_size 24")

    done = call(real, "-o", results, "--keep", "--jobs", "2", "--format", "json")
    assert done.code == 11, done.err
    assert states(done) == {good: "done", bad: "failed"}
    assert "1 of 2 cells have failed" in done.err and "--retry-failed" in done.err
    assert f"1/2 {bad}: failed: " in done.err and f"2/2 {good}: perplexity " in done.err
    first, second = json.loads(done.out)["cells"]
    assert second["exit_code"] == 5 and "24" in second["sentence"]
    (document,) = read_results(results)
    assert document["qualities"][-1]["perplexity"] == first["figures"]["perplexity"]
    assert document["subject"]["name"] == good.replace(" ", "-") and document["tokens"] == 80
    # Read by processes that are forked while another thread of the cell waits for its stdin.
    assert len(document["windows"]) == 2
    assert second["peak_memory_bytes"] > 1 << 26
    peak = document["latency"]["peak_memory_bytes"]
    assert first["peak_memory_bytes"] > peak, "the export is part of the cell"
    assert document["text"] == text_file.name and document["export"]["context"] == 64
    kept = Path(first["folder"]) / document["subject"]["name"]
    assert open_bundle(kept).manifest.source.sha256 == document["source"]["sha256"]
    (failure,) = failures_in(results)
    assert (failure.label, failure.sentence, failure.exit_code) == (bad, second["sentence"], 5)
    assert not [path for path in results.iterdir() if path.name.startswith(".")]

    # Nothing is missing now, wherever the model lies.
    monkeypatch.setattr(local_engine, "attempt", None)
    again = call(real, "-o", results, "--format", "json")
    assert again.code == 11 and states(again) == states(done)
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    elsewhere = written(
        tmp_path / "moved.yaml", real.read_text().replace(str(checkpoint), str(moved))
    )
    assert set(
        states(call(elsewhere, "-o", results, "--dry-run", "--format", "json")).values()
    ) == {
        "done",
        "failed",
    }
    shown = call(real, "-o", results)
    assert shown.code == 11 and "1 done, 1 failed, 0 missing" in shown.out

    told = in_process(capfd, monkeypatch, "report", results, "-o", tmp_path / "page.html")
    assert told.code == 0 and f"failed  {bad}: " in " ".join(told.out.split("\n"))
    page = (tmp_path / "page.html").read_text()
    assert "Cells that failed" in page and str(bad) in page


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tokens: 80", "tokens: 81"),
        ("bits: 4}", "bits: 3}"),
        ("context: 64", "context: 96"),
        ("tokens: 80", "tokens: 80, mode: fp32"),
    ],
)
def test_a_key_follows_from_what_figures_follow_from(
    real: Path, tmp_path: Path, before: str, after: str
) -> None:
    def keys(path: Path) -> list[str]:
        sweep = read_sweep(path)
        return [task.key for task in identity.tasks_of(sweep, cells_of(sweep), tmp_path)]

    other = written(tmp_path / "other.yaml", real.read_text().replace(before, after))
    assert keys(real)[0] != keys(other)[0]
    # What is said of a default changes nothing, so that a setting more in a release does not.
    said = written(
        tmp_path / "said.yaml", real.read_text().replace("bits: 4}", "bits: 4, tune: 0}")
    )
    assert keys(real) == keys(said)


def test_a_key_holds_what_texts_and_weights_are(
    real: Path, checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    def key(path: Path) -> str:
        sweep = read_sweep(path)
        return identity.tasks_of(sweep, cells_of(sweep), tmp_path)[0].key

    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    same = written(tmp_path / "a.yaml", real.read_text().replace(str(text_file), str(text)))
    before = key(same)
    assert before == key(real)
    text.write_text(text.read_text() + " More of it.")
    assert key(same) != before
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    own = written(tmp_path / "b.yaml", real.read_text().replace(str(checkpoint), str(model)))
    assert key(own) == before
    tokenizer = model / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "more": 1}))
    assert key(own) != before


def test_a_cell_finds_its_files_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()  # an export is often called so, and the recipe is meant
    (tmp_path / "text.txt").write_text("Some words to calibrate on.")
    file = written(tmp_path / "near.yaml", "models: [llama]\nsettings: {calibrate: text.txt}")
    sweep = read_sweep(file)
    (cell,) = identity.tasks_of(sweep, cells_of(sweep), tmp_path)
    assert cell.model == "llama"
    assert cell.settings["calibration"]["calibrate"] == str(tmp_path / "text.txt")


# Stubs of cells.

MIXED = """
models: [stub/slow0, stub/refused, stub/crash]
"""


def test_failed_cells_are_tried_again_when_asked(
    stubs: None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, results = written(tmp_path / "mixed.yaml", MIXED), tmp_path / "results"
    results.mkdir()
    call = functools.partial(in_process, capfd, monkeypatch, "sweep", file, "-o", results)
    assert call("--limit", "1").code == 0 and tried(results) == ["slow0"]
    done = call("--format", "json")
    assert done.code == 11 and states(done) == {
        "slow0": "done",
        "refused": "failed",
        "crash": "failed",
    }
    assert sorted(tried(results)) == ["crash", "refused", "slow0"]
    assert call().code == 11 and len(tried(results)) == 3
    assert call("--retry-failed").code == 11
    assert sorted(tried(results)[3:]) == ["crash", "refused"]
    # What was damaged, or has no results any more, is missing.
    (whole,) = (path for path in results.glob("cell-*") if (path / "results.json").exists())
    (whole / "results.json").write_text("{")
    assert call().code == 11 and tried(results)[5:] == ["slow0"]
    (whole / "results.json").write_text("[]")
    assert call().code == 11 and tried(results)[6:] == ["slow0"]
    (whole / "cell.json").write_text("[]")
    assert call().code == 11 and tried(results)[7:] == ["slow0"]


def test_a_sweep_that_is_killed_goes_on(stubs: None, tmp_path: Path, interruptible: None) -> None:
    file = written(tmp_path / "two.yaml", "models: [stub/slow0, stub/hang]")
    results = tmp_path / "results"
    results.mkdir()
    helpers = Path(__file__).parents[2] / "helpers"
    code = f"""
        import functools, sys
        sys.path.insert(0, {str(helpers)!r})
        from llm_coreml.eval.sweep import identity, sweeping
        from llm_coreml.eval.sweep.task import Task
        from stub_cells import ENTRY
        identity.open_model = lambda name, family: name
        identity._hashes = lambda name: (name, "")
        identity.Task = functools.partial(Task, entry=ENTRY)
        sweeping.sweep({str(file)!r}, results={str(results)!r})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    _wait_for(lambda: "hang" in tried(results))
    process.kill()
    process.wait()
    hanging = json.loads((results / "tries.jsonl").read_text().splitlines()[-1])[1]
    _wait_for(lambda: not Path(f"/proc/{hanging}/cmdline").exists())

    def interrupt() -> None:
        _wait_for(lambda: tried(results).count("hang") == 2)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        llm_coreml.sweep(file, results=results)
    assert tried(results) == ["slow0", "hang", "hang"]
    swept = llm_coreml.sweep(file, results=results, plan=True)
    assert [cell.state for cell in swept.cells] == ["done", "missing"]
    assert swept.failures == () and "1 done, 0 failed, 1 missing" in str(swept)
    assert "<td>missing</td>" in swept._repr_html_()


def _wait_for(found: Any) -> None:
    until = threading.Event()
    for _ in range(3000):
        if found():
            return
        until.wait(0.02)
    raise AssertionError("it never came")


def test_what_cannot_be_begun_is_told(
    stubs: None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = written(tmp_path / "one.yaml", "models: [stub/slow0]")
    call = functools.partial(in_process, capfd, monkeypatch, "sweep", file)
    (tmp_path / "taken").write_text("")
    assert call("-o", tmp_path / "taken").code == OutputError.exit_code
    both = call("--ray", "local", "--jobs", "2")
    assert both.code == 2 and "--jobs is for this machine" in both.err
    none = call("--jobs", "0")
    assert none.code == 2 and "--jobs" in none.err
    with pytest.raises(ConfigError, match="--limit"):
        llm_coreml.sweep(file, results=tmp_path / "results", limit=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Ray is not installed .*llm-coreml\[ray\]"):
        llm_coreml.sweep(file, results=tmp_path / "results", ray="auto")
