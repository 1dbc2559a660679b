"""Tries a cell in a process of its own, within its bounds, and never longer than whoever asks.

    outcome = attempt(task, heard, stopped)

A process that crashes, hangs or fills its memory is an outcome like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from llm_coreml.eval.sweep.task import Heard, Outcome, Task, failed
from llm_coreml.output import clear_drafts
from llm_coreml.own_process import python_command
from llm_coreml.printable import printable

# Seconds between two looks at the clock, and those that an interrupted process has to clean up.
_LOOK, _GRACE = 0.2, 25.0
_LAST_WORDS = 300
# A crash ends with the signal's number as shells count it.
_BY_SIGNAL = 128


def attempt(task: Task, heard: Heard, stopped: threading.Event) -> Outcome | None:
    """Try a cell, and return what came of it; None if it was stopped.

    Args:
        task: The cell.
        heard: Told which share is done.
        stopped: Ends it when it is set. So does an exception here, or the end of this process.
    """
    begun = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                python_command(*task.entry),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(task),
                start_new_session=True,  # Ctrl-C is for whoever asks, and ends all of it at once
            )
        except OSError as error:
            return failed(f"No process can be started for it: {error.strerror}.", 1, 0.0)
        lines: queue.Queue[bytes] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), name="cell", daemon=True)
        reader.start()
        try:
            answer, late = _listen(process, lines, task, begun, heard, stopped)
        finally:
            _end(process)
            reader.join()
            _clear_up(task)
        seconds = time.monotonic() - begun
        if answer is not None:
            return _told(answer, seconds)
        if stopped.is_set():
            return None
        return _silent(process.returncode, task, errors, seconds, late)


def _environment(task: Task) -> dict[str, str]:
    settings = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if task.cores is not None:
        settings["OMP_NUM_THREADS"] = str(task.cores)
    return settings


def _listen(
    process: subprocess.Popen[bytes],
    lines: queue.Queue[bytes],
    task: Task,
    begun: float,
    heard: Heard,
    stopped: threading.Event,
) -> tuple[dict[str, Any] | None, bool]:
    """Return a process's answer, None if it gave none; and whether its time was over."""
    with contextlib.suppress(OSError):  # what became of it is told by its end
        stdin = _pipe(process.stdin)
        stdin.write(json.dumps(task.to_json()).encode() + b"\n")
        stdin.flush()
    while not stopped.is_set():
        if time.monotonic() - begun > task.seconds:
            return None, True
        try:
            line = lines.get(timeout=_LOOK)
        except queue.Empty:
            continue
        if not line:
            return None, False
        told = _parsed(line)
        if "share" in told:
            heard(float(told["share"]))
        elif told:
            return told, False
    return None, False


def _read(process: subprocess.Popen[bytes], lines: queue.Queue[bytes]) -> None:
    with contextlib.suppress(OSError), _pipe(process.stdout) as out:
        for line in out:
            lines.put(line)
    lines.put(b"")


def _parsed(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        told = json.loads(line)
        if isinstance(told, dict):
            return told
    return {}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started; who still works may clean up first."""
    with contextlib.suppress(OSError):
        _pipe(process.stdin).close()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _clear_up(task: Task) -> None:
    """Remove the drafts of a process that had no time to."""
    for place in (task.folder, task.keep):
        if place is not None:
            clear_drafts(Path(place))


def _told(answer: dict[str, Any], seconds: float) -> Outcome:
    peak = answer.get("peak_memory_bytes")
    if "document" in answer:
        return Outcome("done", answer["document"], "", 0, seconds, peak)
    sentence, code = str(answer["sentence"]), int(answer["exit_code"])
    return Outcome("failed", None, sentence, code, seconds, peak)


def _silent(code: int, task: Task, errors: IO[bytes], seconds: float, late: bool) -> Outcome:
    """Return the outcome of a process that gave no answer."""
    if late:
        minutes = task.seconds / 60
        told = (
            f"It was not done after {minutes:g} minutes, which is all that a cell may take; set "
            f"more with limits: {{minutes: {2 * minutes:g}}}."
        )
        return failed(told, _BY_SIGNAL + signal.SIGXCPU, seconds)
    if code == -signal.SIGKILL:
        told = (
            "It was killed, as a system does that is short of memory; set fewer --jobs, "
            "or say what a cell takes with memory under limits."
        )
    elif code < 0:
        told = f"It crashed with signal {-code}{_last_words(errors)}."
    else:
        told = f"It ended with code {code}{_last_words(errors)}."
    return failed(told, _BY_SIGNAL - code if code < 0 else code or 1, seconds)


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read()[-4 * _LAST_WORDS :].decode(errors="replace").strip().splitlines()
    return f" ({printable(lines[-1], _LAST_WORDS)})" if lines else ""


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("the process has no pipe")
    return stream
