"""Ctrl-C in every stage, and what else ends a process: one line, an exit code, nothing left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cases import cases
from exported import SHAPES, TEXT, command, files_of, in_process

MESSAGE = "Interrupted; nothing was written.\n"


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(
    label: str, temporary: Path, *words: str | Path, number: signal.Signals = signal.SIGINT
) -> str:
    """Run a command, signal it when stderr ends with `label`, and return what stderr says."""
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
    process.send_signal(number)
    out, rest = process.communicate(timeout=120)
    assert process.returncode == 128 + number, (told + rest).decode()
    assert out == b""
    return (told + rest).decode()


def check(told: str) -> None:
    """Nothing but stages and the message, which has a line of its own."""
    assert told.endswith(f"\n{MESSAGE}")
    assert "Traceback" not in told and "ignored" not in told and "Error" not in told
    *stages, stopped, _ = [line for line in told.splitlines() if line]
    assert all("..." in line and line.endswith(" s") for line in stages)
    assert stopped.endswith("..."), "a stage that did not end shows no time"


EXPORT = (
    "opening the checkpoint ...",
    "reading and quantizing weights ...",
    "reading a text with the quantized model ...",
    "lowering to an ExecuTorch program ...",
    "verifying the artifact ...",
)


# The lowering has most to leave behind.
ENDS = [("SIGINT", label) for label in EXPORT] + [("SIGTERM", EXPORT[3]), ("SIGHUP", EXPORT[4])]
KEPT = {("SIGINT", EXPORT[3]), ("SIGHUP", EXPORT[4])}


@pytest.mark.parametrize(
    "end", cases(map(": ".join, ENDS), {": ".join(end) for end in ENDS if end not in KEPT})
)
def test_export(checkpoint: Path, tmp_path: Path, end: str) -> None:
    (tmp_path / "exports").mkdir()
    name, label = end.split(": ")
    words = ("export", checkpoint, "-o", tmp_path / "exports/out", *SHAPES)
    told = interrupt(label, tmp_path / "temporary", *words, number=signal.Signals[name])
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


@pytest.mark.parametrize("label", cases([EXPORT[0], "scoring text ..."], {EXPORT[0]}))
def test_eval(bundle: Path, checkpoint: Path, tmp_path: Path, label: str) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "exports/out"))
    before = files_of(own)
    told = interrupt(label, tmp_path / "temporary", "eval", own, "--model", checkpoint)
    check(told)
    assert files_of(own) == before
    assert files_of(tmp_path / "temporary") == set()


def test_a_killed_export_is_resumed_to_the_same_bytes(
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, kept = tmp_path / "text.txt", tmp_path / "kept"
    text.write_text(TEXT)
    calibrate = ("--bits", "3", "--calibrate", text, "--calibration-tokens", "64")
    words = ("export", checkpoint, *SHAPES, *calibrate, "--cache", kept)
    killed = subprocess.Popen(
        command(*words, "-o", tmp_path / "out"),
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(list(kept.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    before = {path: path.stat().st_ino for path in kept.glob("*.safetensors")}
    assert len(before) >= 2 and not (tmp_path / "out").exists()

    def export(name: str, *further: str | Path) -> dict[str, bytes]:
        output = tmp_path / name
        done = in_process(capfd, monkeypatch, *words[:-2], *further, "-o", output)
        assert done.code == 0, done.err
        return {path.name: path.read_bytes() for path in output.iterdir()}

    assert export("resumed", "--cache", kept) == export("fresh", "--no-cache")
    after = {path: path.stat().st_ino for path in before}
    assert after == before, "what was kept is used, not made again"
