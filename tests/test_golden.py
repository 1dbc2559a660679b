"""The same exports are the same bytes as before: what a change of shape must not change."""

from __future__ import annotations

from pathlib import Path

import pytest

from cases import cases
from golden import CASES, environment, program_hash, recorded


def test_every_case_is_recorded() -> None:
    assert list(recorded()["programs"]) == list(CASES)


@pytest.mark.parametrize("name", cases(CASES, set(CASES) - {"default"}))
def test_a_program_keeps_its_bytes(name: str, tmp_path: Path) -> None:
    record = recorded()
    if record["environment"] != environment():
        pytest.skip("golden.json was recorded with other libraries, or on another processor")
    assert program_hash(name, tmp_path) == record["programs"][name]
