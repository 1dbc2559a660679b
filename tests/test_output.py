"""A file is whole or as it was; what `new_bundle` adds for folders is in tests/bundle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_coreml.errors import OutputError
from llm_coreml.output import check_writable, file_beside, write_json


def test_a_file_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"before")
    with file_beside(path) as draft:
        draft.write_bytes(b"after")
        assert draft.parent == tmp_path and path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert [each.name for each in tmp_path.iterdir()] == ["out.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug"), OSError(28, "full")])
def test_a_failed_block_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"before")
    with pytest.raises(type(error)) as caught, file_beside(path) as draft:
        draft.write_bytes(b"half")
        raise error
    assert caught.value is error
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["out.bin"]


def test_json_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out\.json' cannot be written: No such file"):
        write_json(tmp_path / "absent" / "out.json", {})
    with pytest.raises(ValueError, match="Circular"):
        value: dict[str, object] = {}
        value["itself"] = value
        write_json(tmp_path / "out.json", value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path, "results.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"and results\.json belongs there; make it writable"):
        check_writable(tmp_path, "results.json")
