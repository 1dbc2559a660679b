"""Drafts: gone when their block ends, and after a kill removed by the next one, never sooner."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llm_coreml import drafts
from llm_coreml.bundle.folder import new_bundle
from llm_coreml.drafts import draft_file, draft_folder, remove_dead, uninterrupted
from llm_coreml.output import file_beside

pytestmark = pytest.mark.usefixtures("interruptible")
# Stops inside of the block for good.
HOLDING = """
import sys, time
from pathlib import Path
from llm_coreml.drafts import draft_file, draft_folder

kind, parent = sys.argv[1:]
with {"file": draft_file, "folder": draft_folder}[kind](Path(parent)) as draft:
    (draft if kind == "file" else draft / "half").write_text("half")
    print("now", flush=True)
    time.sleep(600)
"""
SWAPPING = """
import sys, time
from pathlib import Path
from llm_coreml.output import folder_beside

rename = Path.rename

def stopping(self, target):
    if self.name == "draft":
        print("now", flush=True)
        time.sleep(600)
    return rename(self, target)

Path.rename = stopping
with folder_beside(Path(sys.argv[1]), lambda _: None) as draft:
    (draft / "new").touch()
"""


def started(script: str, *words: str | Path) -> subprocess.Popen[bytes]:
    """Start a script that says `now` where it stops."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"now\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_process_is_cleaned_up_after_and_a_live_one_is_not(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / ".llm-coreml").mkdir()
    others = [*names(tmp_path), "mine"]
    (tmp_path / "mine").touch()
    process = started(HOLDING, kind, tmp_path)
    try:
        (draft,) = set(names(tmp_path)) - set(others)
        with draft_folder(tmp_path) as own:
            assert names(tmp_path) == sorted([*others, draft, own.name])
        assert names(tmp_path) == sorted([*others, draft])
    finally:
        process.kill()
        process.communicate()
    assert draft in names(tmp_path)
    with draft_folder(tmp_path) as own:
        assert names(tmp_path) == sorted([*others, own.name])
    assert names(tmp_path) == sorted(others)


def test_an_export_killed_between_two_renames_gives_back_what_it_took(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    process = started(SWAPPING, output)
    process.kill()
    process.communicate()
    assert not output.exists()
    with new_bundle(tmp_path / "another", overwrite=False):
        assert names(output) == ["old"]
    assert names(tmp_path) == ["another", "out"]


def test_a_link_with_the_name_of_a_draft_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.mkdir()
    (target / "thesis.txt").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "here/.llm-coreml-0").symlink_to(target)
    os.mkfifo(tmp_path / "here/.llm-coreml-1")
    remove_dead(tmp_path / "here")
    assert names(target) == ["thesis.txt"] and ".llm-coreml-0" in names(tmp_path / "here")


def test_a_draft_taken_for_a_dead_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = drafts._lock, []

    def late(path: Path) -> int | None:
        if not taken:
            taken.append(path)
            shutil.rmtree(path)
        return lock(path)

    monkeypatch.setattr(drafts, "_lock", late)
    with draft_folder(tmp_path) as draft:
        assert draft != taken[0] and draft.is_dir()


def test_a_file_system_without_locks_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(drafts.fcntl, "flock", refuse)
    (tmp_path / ".llm-coreml-0").mkdir()
    with file_beside(tmp_path / "out") as draft:
        draft.write_text("x")
    assert names(tmp_path) == [".llm-coreml-0", "out"], "nobody knows whose it is"


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    longest = "x" * 255
    with file_beside(tmp_path / longest) as file:
        file.write_text("x")
    (tmp_path / longest).unlink()
    with new_bundle(tmp_path / longest, overwrite=False):
        pass
    assert names(tmp_path) == [longest]


def test_an_interrupted_draft_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), draft_folder(tmp_path) as folder:
        (folder / "half").touch()
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), draft_file(tmp_path):
        signal.raise_signal(signal.SIGINT)
    assert names(tmp_path) == []


def test_signals_wait_for_the_end_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in drafts.ENDING]
    reached = False
    with pytest.raises(KeyboardInterrupt), uninterrupted(), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert [signal.getsignal(number) for number in drafts.ENDING] == before


def test_what_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_are_never_interrupted() -> None:
    failed = []

    def work() -> None:
        try:
            with uninterrupted():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
