"""Results on disk: every document fits the schema, and no line is lost, halved or misread."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_coreml
from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.eval import results_file
from llm_coreml.eval.results_file import append_result, check_results_folder, read_results


@pytest.fixture(scope="module")
def evaluated(bundle: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle in it that has been evaluated into the folder."""
    folder = tmp_path_factory.mktemp("results")
    own = Path(shutil.copytree(bundle, folder / "own"))
    llm_coreml.evaluate(own, text=text_file, tokens=9, artifact_only=True, results=folder)
    return folder


@pytest.fixture
def document(evaluated: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((evaluated / "own" / "results.json").read_text())
    return found


def test_file_and_line_are_one_document_that_fits_the_schema(
    evaluated: Path, document: dict[str, Any], text_file: Path
) -> None:
    lines = evaluated / "results.jsonl"
    assert read_results(lines) == [document] == read_results(evaluated / "own")
    # The folder's own lines, and the bundle inside of it.
    assert read_results(evaluated) == [document, document]
    assert lines.read_bytes().count(b"\n") == 1
    assert document["version"] == 2 and document["subject"]["kind"] == "bundle"
    assert document["program_bytes"] == (evaluated / "own" / "model.pte").stat().st_size
    assert document["tokens"] == sum(window["tokens"] for window in document["windows"])


def test_words_and_bytes_of_a_whole_text_are_those_of_lm_eval(
    bundle: Path, text_file: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    text = text_file.read_text(encoding="utf-8")
    found = llm_coreml.evaluate(own, text=text_file, tokens=10**6, artifact_only=True)
    assert len(found.windows) > 1
    # lm_eval/tasks/wikitext/preprocess_wikitext.py: both of the page as it is.
    assert found.words == len(re.split(r"\s+", text))
    assert found.text_bytes == len(text.encode("utf-8"))


def _append_many(folder: Path, document: dict[str, Any], name: int) -> None:
    for at in range(40):
        append_result(folder, {**document, "text": f"{name}-{at}" + "x" * 5000})


def test_concurrent_runs_lose_no_line(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    runs = [
        context.Process(target=_append_many, args=(tmp_path / "new" / "results", {"a": 1}, name))
        for name in range(4)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    lines = (tmp_path / "new" / "results" / "results.jsonl").read_text().splitlines()
    names = {json.loads(line)["text"].rstrip("x") for line in lines}
    assert names == {f"{run}-{at}" for run in range(4) for at in range(40)}
    assert len(lines) == 160


def test_half_a_line_of_another_harms_no_other(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "results.jsonl").write_text('{"version": 2, "te')
    append_result(tmp_path, document)
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[1]) == document
    with pytest.raises(ConfigError, match=r"Line 1 of '.*' is damaged"):
        read_results(tmp_path)


def test_a_full_disk_takes_no_half_line(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    append_result(tmp_path, document)
    before = (tmp_path / "results.jsonl").read_bytes()
    write = os.write
    monkeypatch.setattr(results_file.os, "write", lambda number, data: write(number, data[:50]))
    with pytest.raises(OutputError, match="full"):
        append_result(tmp_path, document)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_locked_folder_is_told(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_file, "_PATIENCE", 0.1)
    with (tmp_path / "results.jsonl").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="locked by another process"):
            append_result(tmp_path, document)


def test_a_place_that_takes_nothing_is_refused_before_anything_is_measured(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "own" / "results.jsonl").mkdir(parents=True)
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "own"):
        with pytest.raises(OutputError, match="results belong there"):
            check_results_folder(place)
    check_results_folder(tmp_path / "new" / "one")
    assert not (tmp_path / "new").exists()
    # Root may write anywhere, so that the system's answer is made up.
    monkeypatch.setattr(results_file.os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="--results"):
        check_results_folder(tmp_path)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an earlier version": (lambda d: d.update(version=1), "has version 1 of results; .* version 2"),
    "a later version": (lambda d: d.update(version=3), "has version 3"),
    "no version": (lambda d: d.pop("version"), "has version None"),
    "truth": (lambda d: d.update(version=True), "has version True"),
    "words for numbers": (lambda d: d.update(tokens="9"), r"damaged at \$.tokens"),
    "what nobody knows": (lambda d: d.update(more=1), "damaged"),
    "no windows": (lambda d: d.pop("windows"), "damaged"),
    "a list": (lambda d: d["qualities"].clear(), r"damaged at \$.qualities"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_result_of_this_version_is_refused(
    case: str, document: dict[str, Any], tmp_path: Path
) -> None:
    change, reason = WRONG[case]
    change(document)
    (tmp_path / "one.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=reason) as told:
        read_results(tmp_path)
    assert "one.json" in str(told.value) and "\n" not in str(told.value)


def test_nothing_and_noise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no results"):
        read_results(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results(tmp_path / "absent.json")
    (tmp_path / "noise.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is damaged"):
        read_results(tmp_path)
    (tmp_path / "noise.json").write_text('{"version": 2, "tokens": NaN}')
    with pytest.raises(ConfigError, match="not finite"):
        read_results(tmp_path)


def test_what_fits_is_not_held_against_the_schema_by_the_slow_library(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes eight seconds for ten thousand documents."""
    append_result(tmp_path, document)
    monkeypatch.setattr(results_file, "_validator", None)
    assert read_results(tmp_path) == [document]
    append_result(tmp_path, {**document, "tokens": -1})
    with pytest.raises(TypeError):
        read_results(tmp_path)
