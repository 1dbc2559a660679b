"""Runs foreign data through native code, or a foreign template, in a process of its own.

reply = run_apart("trial", {"path": "tokenizer.json"}, seconds=10)

What would end or stop this process ends that one: a crash of a native library, endless work, all
of memory. The work is a function `work(request)` of a module of this room.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from llm_coreml.own_process import bound_memory, bound_time, python_command

_MODULES = ("trial", "rendering")
# Bytes; the largest tokenizers take a fifth of it.
_MEMORY = 2 << 30
# Of the clock for each second of work: on a busy machine a process gets little of a core.
_PATIENCE = 10


class ApartError(Exception):
    """The other process did not come to an end of its work; the text says why, as a clause."""


def run_apart(module: str, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return what `work(request)` of the room's `module` returns; both are JSON.

    Args:
        module: Which work.
        request: What it is given.
        seconds: How long it may compute; it may take ten times as long by the clock.

    Raises:
        ApartError: it crashed, or took longer, or more than 2 GB of memory.
    """
    settings = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            python_command(__name__, "serve", module, _MEMORY, math.ceil(seconds)),
            input=json.dumps(request).encode(),
            capture_output=True,
            env=settings,
            timeout=_PATIENCE * seconds,
        )
    except subprocess.TimeoutExpired:
        raise ApartError(f"it is not done after {seconds:g} s") from None
    except OSError as error:
        raise ApartError(f"no process can be started for it ({error})") from None
    if done.returncode == -signal.SIGXCPU:
        raise ApartError(f"it is not done after {seconds:g} s")
    try:
        reply = json.loads(done.stdout)
    except ValueError:
        raise ApartError(_last_words(done.returncode, done.stderr)) from None
    if not isinstance(reply, dict):
        raise ApartError(_last_words(done.returncode, done.stderr))
    return reply


def _last_words(code: int, stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    if code < 0:
        return f"it crashed with signal {-code}" + (f" ({lines[-1]})" if lines else "")
    return f"it failed ({lines[-1] if lines else f'exit code {code}'})"


def serve(module: str, memory: int, seconds: int) -> None:
    """Answer one request from stdin, in the other process, with so much `memory` and time."""
    bound_memory(memory)
    bound_time(seconds)
    if module not in _MODULES:
        raise ValueError(module)
    work = importlib.import_module(f"{__package__}.{module}").work
    reply = json.dumps(work(json.load(sys.stdin.buffer)))
    sys.stdout.write(reply)
    sys.stdout.flush()
    # Whatever a library still does at its end cannot change the answer.
    os._exit(0)
