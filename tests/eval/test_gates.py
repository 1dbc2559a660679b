"""Gates on an evaluation: verdicts, sentences, exit codes, JUnit XML, and the example for CI."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from exported import in_process
from llm_coreml.errors import ConfigError, GateError, OutputError, UnmeasuredError
from llm_coreml.eval.gates import Gates, judge, raise_failures
from llm_coreml.eval.junit import write_junit
from result_documents import document

EXAMPLE = Path(__file__).parents[2] / "docs/examples/quality-gate.yml"
PERPLEXITY = math.exp(2.175)


def test_gates_that_hold_say_nothing() -> None:
    gates = Gates(
        max_perplexity=PERPLEXITY + 1e-9,
        max_kl=0.02 + 1e-12,
        min_top1=0.9 - 1e-12,
        max_bytes=1000,
        baseline=document(),
        max_regression=0.0,
    )
    verdicts = judge(gates, document())
    assert [each.state for each in verdicts] == ["held"] * 8
    raise_failures(verdicts)
    assert judge(Gates(), document()) == () and not Gates().any and gates.any


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        ({"max_perplexity": 8.0}, "perplexity is 8.8022, and --max-perplexity asks for 8.0000 at"),
        (
            {"max_kl": 0.01},
            "mean KL is 0.02000, and --max-kl asks for 0.01000 at most (0.01000, 10",
        ),
        ({"min_top1": 0.95}, "top-1 is 90.00%, .* 95.00% at least \\(5.00 points too few"),
        ({"max_bytes": 800}, "program bytes is 1,000, .* 800 at most \\(200, 25.00% too much"),
    ],
)
def test_a_gate_says_what_fails_by_how_much(gates: dict[str, Any], words: str) -> None:
    with pytest.raises(GateError, match=words.replace("(0.01000, 10", r"\(0.01000, 10")):
        raise_failures(judge(Gates(**gates), document()))


def test_several_failures_are_told_together() -> None:
    verdicts = judge(Gates(max_perplexity=2, max_kl=0.001, max_bytes=2000), document())
    with pytest.raises(GateError, match=r"^2 of 3 gates are not held: .*; .*\.$"):
        raise_failures(verdicts)


def test_a_figure_that_was_not_measured_is_an_error_of_its_own() -> None:
    bare = document(kl=None, top1=None)
    with pytest.raises(UnmeasuredError, match="--max-kl asks for mean KL, which was not measured"):
        raise_failures(judge(Gates(max_kl=0.1), bare))
    # A failure that is known comes first.
    with pytest.raises(GateError):
        raise_failures(judge(Gates(max_kl=0.1, max_perplexity=2), bare))
    with pytest.raises(UnmeasuredError, match="--artifact-only"):
        Gates(min_top1=0.5).check_measured(artifact_only=True)
    Gates(max_perplexity=5).check_measured(artifact_only=True)
    assert (GateError.exit_code, UnmeasuredError.exit_code) == (3, 10)


def test_logits_that_are_no_numbers_fail_every_gate_of_quality() -> None:
    found = document()
    artifact = found["qualities"][-1]
    artifact |= {"perplexity": None, "mean_kl": None, "top1_agreement": None}
    artifact["not_finite"] = {"rows": 3, "window": 1, "position": 7, "token": 5}
    verdicts = judge(Gates(max_perplexity=9, min_top1=0.1, max_bytes=1000), found)
    assert [each.state for each in verdicts] == ["failed", "failed", "held"]
    with pytest.raises(
        GateError, match=r"3 rows of logits hold NaN or inf, .* window 1, position 7"
    ):
        raise_failures(verdicts)


def test_a_baseline_allows_a_share() -> None:
    worse = document(nll=(2.02, 2.22, 2.42, 2.12), size=1005)
    gates = Gates(baseline=document(), max_regression=0.01)
    states = {each.gate: each.state for each in judge(gates, worse)}
    assert states == {
        "max-regression-perplexity": "failed",
        "max-regression-mean-kl": "held",
        "max-regression-top1-agreement": "held",
        "max-regression-program-bytes": "held",
    }
    with pytest.raises(GateError, match=r"2\.02% worse, and --max-regression allows 1\.00%"):
        raise_failures(judge(gates, worse))
    # Better is never a regression.
    better = document(nll=(1.0,) * 4, kl=(0.001,) * 4, top1=(1.0,) * 4, size=10)
    raise_failures(judge(Gates(baseline=document(), max_regression=0.0), better))


def test_a_regression_that_is_noise_is_called_so() -> None:
    baseline = document(nll=(2.0, 2.0, 2.0, 2.0), kl=None, top1=None)
    worse = document(nll=(1.5, 2.5, 1.6, 2.5), kl=None, top1=None)
    with pytest.raises(GateError, match="worse, within noise, and"):
        raise_failures(judge(Gates(baseline=baseline), worse))


def test_a_baseline_of_another_text_cannot_be_judged() -> None:
    gates = Gates(baseline=document(text="another"))
    with pytest.raises(UnmeasuredError, match="another text than the baseline's"):
        raise_failures(judge(gates, document()))
    bare = document(kl=None, top1=None)
    with pytest.raises(UnmeasuredError, match="mean KL, which was not measured"):
        raise_failures(judge(Gates(baseline=document()), bare))


@pytest.mark.parametrize(
    "values",
    [
        {"max_perplexity": math.nan},
        {"max_perplexity": 0.5},
        {"max_kl": -0.1},
        {"min_top1": 1.1},
        {"max_bytes": 0},
        {"max_regression": math.inf},
    ],
)
def test_absurd_gates_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--(max|min)-"):
        Gates(**values)


def test_junit_has_a_case_for_each_gate(tmp_path: Path) -> None:
    bare = document(kl=None, top1=None)
    verdicts = judge(Gates(max_perplexity=2, max_kl=0.1, max_bytes=1000), bare)
    write_junit(tmp_path / "gates.xml", "o<ut\x1b", verdicts)
    root = ElementTree.parse(tmp_path / "gates.xml").getroot()
    assert root.attrib == {"tests": "3", "failures": "1", "errors": "1"}
    cases = {case.get("name"): case[0] for case in root.iter("testcase")}
    assert [(name, each.tag) for name, each in cases.items()] == [
        ("max-perplexity", "failure"),
        ("max-kl", "error"),
        ("max-bytes", "system-out"),
    ]
    assert "8.8022" in str(cases["max-perplexity"].get("message"))
    with pytest.raises(OutputError):
        write_junit(tmp_path / "gone" / "gates.xml", "out", verdicts)


def test_eval_ends_with_the_gates_code(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(bundle, copy)
    monkeypatch.chdir(tmp_path)

    def measured(*words: str | Path) -> Any:
        options = ("--text", text_file, "--tokens", "20", "--model", checkpoint)
        return in_process(capfd, monkeypatch, "eval", copy, *options, *words)

    held = measured("--max-bytes", "1GB", "--junit", "gates.xml")
    assert held.code == 0 and 'failures="0"' in (tmp_path / "gates.xml").read_text()
    shutil.copy(copy / "results.json", tmp_path / "baseline.json")
    against = ("--against", "baseline.json", "--max-regression", "0.5%")
    assert measured(*against).code == 0
    failed = measured(
        *against, "--max-perplexity", "1.5", "--junit", "gates.xml", "--format", "json"
    )
    assert failed.code == 3 and failed.err.count("Error: ") == 1
    assert "--max-perplexity asks for 1.5000" in failed.err
    # What was measured is kept and printed all the same.
    assert json.loads(failed.out) == json.loads((copy / "results.json").read_text())
    assert 'failures="1"' in (tmp_path / "gates.xml").read_text()
    for code, words in (
        (10, ("--artifact-only", "--max-kl", "1")),
        (2, ("--max-regression", "1%")),
        (2, ("--junit", "gates.xml")),
        (2, ("--against", "baseline.json", "--max-regression", "-1%")),
        (2, ("--against", "gone.json")),
        (6, ("--max-bytes", "1", "--junit", "gone/gates.xml")),
    ):
        refused = measured(*words)
        assert refused.code == code, (words, refused.err)
        assert "Traceback" not in refused.err and refused.out == ""


def test_the_example_for_ci_is_a_script_that_runs(checkpoint: Path, tmp_path: Path) -> None:
    """The steps of the example, one after the other, on a small model."""
    workflow = yaml.safe_load(EXAMPLE.read_text())
    steps = [step for step in workflow["jobs"]["gate"]["steps"] if "run" in step]
    settings = {
        **os.environ,
        **workflow["env"],
        "MODEL": str(checkpoint),
        "EXPORT": "--bits 4 --context 64 --seq-lengths 1,8",
        "EVAL": "--tokens 20",
        "GATES": "--max-kl 1.0 --min-top1 0.1 --max-bytes 600MB",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }

    def step(name: str, **changes: str) -> subprocess.CompletedProcess[str]:
        (found,) = [each for each in steps if each["name"].startswith(name)]
        return subprocess.run(
            ["bash", "-eo", "pipefail", "-c", found["run"]],
            cwd=tmp_path,
            env={**settings, **changes},
            capture_output=True,
            text=True,
        )

    assert step("export").returncode == 0
    first = step("evaluate")
    assert first.returncode == 0, first.stderr
    shutil.copy(tmp_path / "out/results.json", tmp_path / "baseline.json")
    second = step("evaluate", GATES="--max-kl 1e-9")
    assert second.returncode == 3, second.stderr
    assert (tmp_path / "gates.xml").is_file()
    assert step("what").returncode == 0
    assert "program bytes" in (tmp_path / "summary.md").read_text()
