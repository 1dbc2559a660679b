"""The product's checks on two hundred wrong programs: at least 95 in 100 must be noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import Survey, mutants


def test_wrong_programs_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    survey = Survey(mutants(count=200, seed=0, folder=tmp_path))
    with capsys.disabled():
        print(f"\n{survey.table()}")
    kinds = {mutant.mutation.kind for mutant in survey.changed}
    assert len(survey.changed) + len(survey.equivalent) == 200
    # Otherwise there is little to notice, or little that was tried.
    assert len(survey.changed) >= 150 and len(kinds) >= 16
    assert survey.share >= 0.95, survey.table()
