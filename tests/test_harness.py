"""What tests share is made once for the same sources, and apart for others; cases are marked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cases import cases
from llm_coreml.config import ExportConfig
from shared import Shared, Source, fingerprint
from tiny import llama, save

CONFIG = ExportConfig(context=32, seq_lengths=(1, 8))


@pytest.fixture
def writer() -> Callable[[Path], None]:
    """Write how often it was called."""
    calls: list[Path] = []

    def write(path: Path) -> None:
        calls.append(path)
        path.write_text(str(len(calls)))

    return write


def test_the_same_sources_are_made_once_and_others_apart(
    tmp_path: Path, writer: Callable[[Path], None]
) -> None:
    first = Shared(tmp_path).file("model.pte", [llama(), CONFIG], writer)
    again = Shared(tmp_path).file("model.pte", [llama(), replace(CONFIG)], writer)
    assert first == again and first.name == "model.pte" and first.read_text() == "1"
    other = Shared(tmp_path).file("model.pte", [llama(), replace(CONFIG, context=64)], writer)
    assert other != first and other.read_text() == "2" and first.read_text() == "1"
    renamed = Shared(tmp_path).file("twin.pte", [llama(), CONFIG], writer)
    assert renamed.read_text() == "3"


def touched() -> torch.nn.Module:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[-1] += 1e-6
    return model


def test_every_source_counts(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model")
    before = fingerprint([folder])
    (folder / "more.txt").write_text("more")
    assert fingerprint([folder]) != before
    kinds: list[list[Source]] = [
        [llama()],
        [touched()],
        [llama().half()],
        [llama(rms_norm_eps=1e-6)],
        [folder],
        [CONFIG],
        [replace(CONFIG, bits=4)],
        ["a", "b"],
        ["ab"],
        [],
    ]
    assert len({fingerprint(sources) for sources in kinds}) == len(kinds)
    assert fingerprint([llama(), "a"]) == fingerprint([llama(), "a"])


def test_who_comes_while_it_is_made_waits_for_it(tmp_path: Path) -> None:
    made: list[str] = []

    def slowly(path: Path) -> None:
        made.append("begun")
        time.sleep(0.2)
        path.write_text("whole")

    def ask() -> None:
        made.append(Shared(tmp_path).file("slow.txt", ["x"], slowly).read_text())

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["begun", "whole", "whole", "whole"]


def test_what_failed_is_made_anew(tmp_path: Path, writer: Callable[[Path], None]) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Shared(tmp_path).folder("thing", ["x"], fail)
    folder = Shared(tmp_path).folder("thing", ["x"], lambda folder: writer(folder / "whole"))
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_workers_of_a_session_have_one_folder(
    shared: Shared, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> None:
    base = tmp_path_factory.getbasetemp()
    assert shared.root.parent == (base if worker_id == "master" else base.parent)
    assert base.name.startswith("popen-") == (worker_id != "master")


def test_further_cases_are_marked_and_no_case_is_lost() -> None:
    found = {case.id: [mark.name for mark in case.marks] for case in cases("abc", "b")}
    assert found == {"a": [], "b": ["exhaustive"], "c": []}
    with pytest.raises(ValueError, match=r"\['d'\] are no cases"):
        cases("abc", "ad")
