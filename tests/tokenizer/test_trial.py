"""Tokenizer files that crash, hang or panic their library end in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_coreml.errors import CheckpointError
from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer, apart, trial
from llm_coreml.tokenizer.apart import ApartError, run_apart
from llm_coreml.tokenizer.trial import UnfitError, try_apart

DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def broken(folder: Path, **changes: Any) -> Path:
    tokenizer = json.loads((bundled_model() / "tokenizer.json").read_text())
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**tokenizer, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, 0, "charsmap"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, 1, "chunk size"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 2**60, "stop": 1}}, 1, "cannot"),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}, 1, "Missing"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, 1, "unk_id"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, 1, "no token for 'a'"),
        ({"model": {"type": "None"}}, 0, "no tokenizer"),
    ],
    ids=["charsmap", "length", "strip", "words", "unigram", "empty", "unknown"],
)
def test_odd_tokenizers(changes: dict[str, Any], error: int, told: str, tmp_path: Path) -> None:
    path = broken(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=told) as caught:
        Tokenizer(path)
    assert isinstance(caught.value, UnfitError) == bool(error)


def test_a_tokenizer_that_takes_all_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_MEMORY", 300_000_000)
    path = broken(tmp_path, normalizer={"type": "Sequence", "normalizers": [DOUBLE] * 60})
    with pytest.raises(CheckpointError, match="cannot be used as a tokenizer: it crashed"):
        Tokenizer(path)


def test_a_tokenizer_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_SECONDS", 0.001)
    with pytest.raises(CheckpointError, match=r"it is not done after 0\.001 s"):
        Tokenizer(broken(tmp_path, version="1.0", unused=1))


def test_a_content_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = broken(tmp_path)
    try_apart(path)
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(trial, "run_apart", lambda *_: pytest.fail("tried again"))
    try_apart(copy)


def test_a_process_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart.sys, "executable", "/nowhere/python")
    with pytest.raises(ApartError, match="no process can be started"):
        run_apart("trial", {}, 5)


def test_what_the_other_process_says_is_told() -> None:
    with pytest.raises(ApartError, match=r"it failed.*ValueError: foreign"):
        run_apart("foreign", {}, 20)
