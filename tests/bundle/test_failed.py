"""A file that fails its verification is kept beside its place, with what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_coreml.bundle.failed import FIGURES, keep_failed
from llm_coreml.bundle.folder import PROGRAM, new_bundle
from llm_coreml.config import ExportConfig
from llm_coreml.errors import ArtifactError, VerificationError
from llm_coreml.pipeline import export
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.verify.verification import Conversion
from tiny import llama

CONFIG = ExportConfig(context=32, seq_lengths=(1, 4), scheme="int8-channel")


def attempt(output: Path, **settings: Any) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        export(llama(), output=output, config=CONFIG, cache=False, **settings)
    return caught.value


def test_a_file_that_fails_is_kept_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "made" / "out"
    monkeypatch.setattr("llm_coreml.verify.logits.conversion_bound", lambda *_: 1.0)
    monkeypatch.setattr("llm_coreml.verify.logits.bounds", lambda plain: (1e-9, 1e-12))
    error = attempt(output)
    kept = tmp_path / "made" / "out.failed"
    assert f"is kept in '{kept}', its figures in {FIGURES} there." in str(error)
    assert error.exit_code == 8
    assert [path.name for path in output.parent.iterdir()] == ["out.failed"]
    assert sorted(path.name for path in kept.iterdir()) == [PROGRAM, FIGURES]
    # What is kept runs, and is no bundle.
    ReferenceRunner(kept / PROGRAM).feed([1, 2])
    told = json.loads((kept / FIGURES).read_text())
    assert told["error"] in str(error)
    found = told["found"]
    assert found["max_relative_error"] > found["max_relative_error_bound"] == 1e-9
    assert found["conversion"]["weights"] > 0 and found["plain_fp16"]["rows"] > 0


def test_what_stands_in_the_place_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = tmp_path / "out.failed"
    foreign.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr("llm_coreml.verify.logits.bounds", lambda plain: (1e-9, 1e-12))
        attempt(tmp_path / "out")
    export(llama(), output=tmp_path / "out", config=CONFIG, cache=False)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["out", "out.failed", "out.failed-2"]
    assert foreign.read_text() == "mine"


def test_figures_that_are_no_numbers_are_told_in_words(tmp_path: Path) -> None:
    found = Conversion(3, 4, float("nan"), 1e-5)
    with pytest.raises(VerificationError), new_bundle(tmp_path / "out", False) as draft:
        raise keep_failed(draft, tmp_path / "out", VerificationError("It fails.", found))
    told = json.loads((tmp_path / "out.failed" / FIGURES).read_text())
    assert told["found"]["max_relative_error"] == "nan" and told["found"]["weights"] == 3


def test_any_other_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ArtifactError("no")

    monkeypatch.setattr("llm_coreml.pipeline.verify_conversion", fail)
    with pytest.raises(ArtifactError):
        export(llama(), output=tmp_path / "out", config=CONFIG, cache=False)
    assert not list(tmp_path.iterdir())
