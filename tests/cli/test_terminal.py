"""What a person at a terminal sees: bars and results, and nobody else's chatter."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

from exported import CHATTER, SHAPES, command


def test_a_terminal_shows_stages_and_the_result_alone(checkpoint: Path, tmp_path: Path) -> None:
    outer, inner = pty.openpty()
    words = command("export", checkpoint, "-o", tmp_path / "out", *SHAPES)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(words, stdout=inner, stderr=inner, stdin=inner, env=environment)
    os.close(inner)
    shown = b""
    while True:
        try:
            piece = os.read(outer, 4096)
        except OSError:  # how Linux says that the other end is closed
            piece = b""
        if not piece:
            break
        shown += piece
    os.close(outer)
    text = shown.decode()
    assert process.wait(timeout=60) == 0, text
    for stage in ("opening the checkpoint", "lowering to an ExecuTorch", "verifying the artifact"):
        assert stage in text
    assert "verified by" in text and "━" in text
    for known in CHATTER:
        assert known not in text, known
