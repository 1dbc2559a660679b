"""What can be evaluated: each kind gives the figures of the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llm_coreml
from exported import in_process
from llm_coreml.artifact.description import Description
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.errors import CheckpointError, ConfigError, SystemUnfitError
from llm_coreml.eval import runtimes
from llm_coreml.eval.measurable import kind_of
from llm_coreml.eval.results import Evaluation
from llm_coreml.eval.results_file import read_results
from llm_coreml.eval.runtimes import bundle_runner, program_runner_of
from llm_coreml.inspect.extraction import extract
from llm_coreml.progress_bar import Step
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime import executorch
from llm_coreml.runtime.executorch_engine import Engine
from tiny import llama, save

TOKENS = 90


def measured(what: Any, text: Path, tokenizer: Any = None, **settings: Any) -> Evaluation:
    return llm_coreml.evaluate(what, tokenizer, text=text, tokens=TOKENS, cache=False, **settings)


@pytest.fixture(scope="module")
def whole(
    bundle: Path, checkpoint: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Evaluation:
    own = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("whole") / "own"))
    return measured(own, text_file, model=checkpoint)


def test_a_bare_program_has_the_figures_of_its_bundle(
    bundle: Path, checkpoint: Path, text_file: Path, tmp_path: Path, whole: Evaluation
) -> None:
    bare = Path(shutil.copy(bundle / "model.pte", tmp_path / "bare.pte"))
    places = {"model": checkpoint, "results": tmp_path / "results"}
    # Its two windows are read in two processes.
    found = measured(bare, text_file, bundle, jobs=2, **places)
    assert len(found.windows) == 2
    assert found.artifact.figures == whole.artifact.figures
    assert [each.name for each in found.qualities] == ["original", "artifact"]
    (written,) = read_results(tmp_path / "results")
    assert written["subject"] == {
        "kind": "pte",
        "name": "bare.pte",
        "sha256": whole.program_sha256,
    }
    assert written["export"] is written["source"] is written["bits_per_weight"] is None
    assert written["program_bytes"] == bare.stat().st_size
    assert str(found) and sorted(each.name for each in tmp_path.iterdir()) == [
        "bare.pte",
        "results",
    ]


def test_a_package_is_read_as_the_program_around_it(
    bundle: Path, text_file: Path, tmp_path: Path, whole: Evaluation
) -> None:
    extract(bundle, tmp_path / "models")
    package = tmp_path / "models" / "model-0.mlpackage"
    with pytest.raises(ConfigError, match="its folder, with --tokenizer"):
        measured(package, text_file)
    steps: list[Step] = []
    found = measured(package, text_file, bundle / "tokenizer.json", progress=steps.append)
    assert found.subject is not None and found.subject.kind == "mlpackage"
    assert found.windows == whole.windows
    # One token at a time, so that sums come in another order than in chunks.
    assert found.artifact.perplexity == pytest.approx(whole.artifact.perplexity, rel=5e-3)
    assert found.artifact.runtime == "reference runtime" and found.program_sha256 is None
    assert {"open", "score", "time"} <= {step.stage for step in steps}
    with pytest.raises(ConfigError, match=r"does not run a \.mlpackage"):
        measured(package, text_file, bundle, runtime="executorch")


def test_an_original_is_measured_by_itself(
    checkpoint: Path, live_model: Any, bundle: Path, text_file: Path, whole: Evaluation
) -> None:
    found, original = measured(checkpoint, text_file), whole.quality("original")
    assert found.artifact.perplexity == pytest.approx(original.perplexity, rel=1e-6)
    assert found.subject is not None and found.subject.kind == "eager"
    assert found.source is not None and found.source["kind"] == "folder"
    assert found.subject.sha256 == (whole.source or {})["sha256"]
    assert [each.tokens for each in found.latencies] == [1, 8, 64]
    beside = measured(live_model, text_file, bundle_tokenizer(bundle), model=checkpoint)
    assert beside.artifact.mean_kl == 0.0 and beside.artifact.top1_agreement == 1.0
    with pytest.raises(ConfigError, match="runs exports, and this is a model"):
        measured(checkpoint, text_file, runtime="reference")
    for what, runtime in ((checkpoint, "auto"), (bundle, "eager")):
        with pytest.raises(ConfigError, match="leave mode and device out"):
            measured(what, text_file, runtime=runtime, execution=Execution("fp32"))


def bundle_tokenizer(bundle: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(bundle / "tokenizer.json"))


def test_another_original_is_refused(bundle: Path, text_file: Path, tmp_path: Path) -> None:
    other = save(llama(vocab_size=98), tmp_path / "other")
    bare = Path(shutil.copy(bundle / "model.pte", tmp_path / "bare.pte"))
    with pytest.raises(CheckpointError, match="has 98 tokens, and what is evaluated"):
        measured(bare, text_file, bundle, model=other)


def test_a_bundle_runs_eagerly(
    bundle: Path,
    checkpoint: Path,
    text_file: Path,
    tmp_path: Path,
    whole: Evaluation,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    words = ("--model", checkpoint, "--text", text_file, "--tokens", str(TOKENS))
    words = (*words, "--runtime", "eager", "--format", "json", "--jobs", "2", "--no-cache")
    found = in_process(capfd, monkeypatch, "eval", own, *words)
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["qualities"][-1]["runtime"] == "PyTorch eager fp32"
    quantized = whole.quality("quantized").figures
    assert told["qualities"][-1]["perplexity"] == pytest.approx(quantized["perplexity"], rel=1e-6)
    refused = in_process(capfd, monkeypatch, "eval", own, "--tokenizer", own)
    assert refused.code == 2 and "leave --tokenizer out" in refused.err


class StandIn(Engine):
    """What ExecuTorch on macOS would be."""

    def __init__(self, path: Path, description: Description) -> None:
        self.loads = 0

    def load(self) -> None:
        self.loads += 1

    def run(self, *arguments: Any) -> Any:
        raise AssertionError("no text is read here")


def test_executorch_runs_core_ml_on_macos_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_bundle(bundle)
    for run in (
        lambda: bundle_runner(opened, "executorch", Execution()),
        lambda: program_runner_of(opened.program, "executorch", Execution()),
    ):
        monkeypatch.setattr(runtimes.platform, "system", lambda: "Linux")
        with pytest.raises(SystemUnfitError, match="which macOS alone has"):
            run()
        monkeypatch.setattr(runtimes.platform, "system", lambda: "Darwin")
        monkeypatch.setattr(executorch, "Apart", StandIn)
        assert run().label == "Core ML, run by ExecuTorch on macOS"
    with pytest.raises(ConfigError, match="no choice of mode or device"):
        bundle_runner(opened, "executorch", Execution(mode="fp32"))
    with pytest.raises(ConfigError, match="nothing tells which one"):
        program_runner_of(opened.program, "eager", Execution())


def test_kinds_are_told_by_what_is_there(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    expected = {
        bundle: "bundle",
        bundle / "model.pte": "bundle",
        checkpoint: "eager",
        tmp_path / "bare.pte": "pte",
        tmp_path / "x.mlpackage": "mlpackage",
        tmp_path: "bundle",
        tmp_path / "gone": "bundle",
        "meta-llama/Llama-3.2-1B": "eager",
        "gone": "bundle",
        "./gone": "bundle",
        "a/b/c": "bundle",
    }
    assert {what: kind_of(what) for what in expected} == expected
