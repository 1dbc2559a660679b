"""Ctrl-C in every stage: one line, exit code 130, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from exported import SHAPES, command, files_of

MESSAGE = "Interrupted; nothing was written.\n"


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(label: str, temporary: Path, *words: str | Path) -> str:
    """Run a command, press Ctrl-C when stderr ends with `label`, and return what stderr says."""
    temporary.mkdir()
    process = subprocess.Popen(
        command(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
        # A test run in the background may have been told to ignore Ctrl-C, and would pass it on.
        preexec_fn=heed_ctrl_c,
    )
    assert process.stdout is not None and process.stderr is not None
    told = b""
    while not told.endswith(label.encode()):
        byte = process.stderr.read(1)
        assert byte, told.decode()
        told += byte
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=120)
    assert process.returncode == 130, (told + rest).decode()
    assert out == b""
    return (told + rest).decode()


def check(told: str) -> None:
    """Nothing but stages and the message, which has a line of its own."""
    assert told.endswith(f"\n{MESSAGE}")
    assert "Traceback" not in told and "ignored" not in told and "Error" not in told
    *stages, stopped, _ = [line for line in told.splitlines() if line]
    assert all("..." in line and line.endswith(" s") for line in stages)
    assert stopped.endswith("..."), "a stage that did not end shows no time"


@pytest.mark.parametrize(
    "label",
    [
        "opening the checkpoint ...",
        "reading and quantizing weights ...",
        "lowering to an ExecuTorch program ...",
        "verifying the artifact ...",
    ],
)
def test_export(checkpoint: Path, tmp_path: Path, label: str) -> None:
    (tmp_path / "exports").mkdir()
    output = tmp_path / "exports/out"
    told = interrupt(label, tmp_path / "temporary", "export", checkpoint, "-o", output, *SHAPES)
    check(told)
    assert files_of(tmp_path / "exports") == set()
    assert files_of(tmp_path / "temporary") == set()


def test_overwrite_keeps_the_earlier_export(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "exports/out"
    shutil.copytree(bundle, output)
    before = {path: path.read_bytes() for path in output.iterdir()}
    words = ("export", checkpoint, "-o", output, *SHAPES, "--overwrite", "--bits", "8")
    told = interrupt("reading and quantizing weights ...", tmp_path / "temporary", *words)
    check(told)
    assert {path: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["out"]


@pytest.mark.parametrize("label", ["opening the checkpoint ...", "scoring text ..."])
def test_eval(bundle: Path, tmp_path: Path, label: str) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "exports/out"))
    before = files_of(own)
    told = interrupt(label, tmp_path / "temporary", "eval", own)
    check(told)
    assert files_of(own) == before
    assert files_of(tmp_path / "temporary") == set()
