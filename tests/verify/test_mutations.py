"""The product's checks on two hundred wrong programs: at least 95 in 100 must be noticed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts import Artifact
from llm_coreml.errors import ArtifactError
from mutants import Survey, mutants
from mutations import Package, mutations


def test_wrong_programs_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiny weights stay packed as large ones do, so that calls are run side by side.
    monkeypatch.setattr("llm_coreml.reference.program.constants._SMALL", 16)
    survey = Survey(mutants(count=200, seed=0, folder=tmp_path))
    with capsys.disabled():
        print(f"\n{survey.table()}")
    kinds = {mutant.mutation.kind for mutant in survey.changed}
    assert len(survey.changed) + len(survey.equivalent) == 200
    # Otherwise there is little to notice, or little that was tried.
    assert len(survey.changed) >= 150 and len(kinds) >= 16
    assert survey.share >= 0.95, survey.table()


def test_a_description_that_contradicts_the_program_is_refused_at_once(
    quantized: Callable[[str], Artifact],
) -> None:
    artifact = quantized("int4-channel")
    package = Package(artifact.path)
    tried = 0
    for mutation in mutations(package, random.Random(0)):
        # Lengths are described only: the program leaves them open.
        lengths = "axis 1" in mutation.what and "cache" not in mutation.what
        if mutation.kind != "interface" or lengths:
            continue
        with package.changed(mutation), pytest.raises(ArtifactError, match="describes"):
            artifact.runner()
        tried += 1
    assert tried >= 14
