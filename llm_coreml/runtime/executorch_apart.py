"""ExecuTorch's runtime in a process of its own, for a `.pte` that nobody vouches for.

A container whose every offset is in order may still hold instructions, shapes and an XNNPACK graph
that crash the runtime, never end or ask for all memory. Here that ends the other process, and this
one tells of it. The two exchange lines of JSON through pipes; logits follow as plain bytes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, final

import torch

from llm_coreml.artifact.description import Description
from llm_coreml.errors import ArtifactError
from llm_coreml.own_process import bound_further_memory, python_command
from llm_coreml.quiet import is_loud
from llm_coreml.runtime.executorch_engine import Engine, Here

_LONGEST_LINE = 1 << 16
# What small programs are given; the slowest machines in use read and multiply more in a second.
_SECONDS, _LOADED_PER_SECOND, _MULTIPLIED_PER_SECOND = 20.0, 50e6, 500e6
# Beside weights, which are read and packed, and states, of which there are copies.
_MEMORY, _MEMORY_PER_THREAD = 1 << 30, 1 << 24


@final
class Apart(Engine):
    """ExecuTorch's runtime in another process, which ends with this object.

    Args:
        path: The `.pte`.
        description: What it offers.

    Raises:
        ArtifactError: no process can be started.
    """

    def __init__(self, path: Path, description: Description) -> None:
        self._path = path
        self._bytes = path.stat().st_size
        numbers = sum(map(math.prod, [*description.state_shapes, *description.cache_shapes]))
        memory = _MEMORY + 4 * (self._bytes + 4 * numbers)
        command = python_command(__name__, "serve", str(path), memory, *description.methods)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if is_loud() else subprocess.DEVNULL,
            )
        except OSError as error:
            raise ArtifactError(
                f"'{path}' is to be run in a process of its own, and none can be started ({error})."
            ) from None
        weakref.finalize(self, _end, self._process)
        # What it imports is ours, and takes as long as it takes.
        self._answer(math.inf)

    def load(self) -> None:
        """Load the program's methods."""
        self._ask({}, _SECONDS + self._bytes / _LOADED_PER_SECOND)

    def run(
        self, method: str, tokens: torch.Tensor, start_pos: torch.Tensor, shape: Sequence[int]
    ) -> torch.Tensor:
        """Call a method."""
        call = {"method": method, "tokens": tokens.tolist(), "start_pos": start_pos.tolist()}
        work = self._bytes * tokens.shape[1]
        content = self._ask(
            {**call, "shape": list(shape)}, _SECONDS + work / _MULTIPLIED_PER_SECOND
        )
        return torch.frombuffer(content, dtype=torch.float32).reshape(list(shape))

    def _ask(self, request: dict[str, Any], seconds: float) -> bytearray:
        with contextlib.suppress(OSError):  # what it has to say of its end is read below
            _pipe(self._process.stdin).write(json.dumps(request).encode() + b"\n")
            _pipe(self._process.stdin).flush()
        size = 4 * math.prod(request.get("shape", (0,)))
        return self._answer(seconds, size)

    def _answer(self, seconds: float, size: int = 0) -> bytearray:
        """Return the `size` bytes that follow an answer which tells of no error."""
        timer = None
        if seconds < math.inf:
            timer = threading.Timer(seconds, self._process.kill)
            timer.daemon = True
            timer.start()
        out = _pipe(self._process.stdout)
        try:
            line = out.readline(_LONGEST_LINE)
            answer = json.loads(line) if line.endswith(b"\n") else None
            told = answer.get("error") if isinstance(answer, dict) else None
            content = out.read(size) if isinstance(answer, dict) and told is None else None
        except ValueError:
            told = content = None
        finally:
            late = timer is not None and not timer.is_alive()
            if timer is not None:
                timer.cancel()
        if told is not None:
            raise ArtifactError(str(told))
        if content is None or len(content) != size:
            raise ArtifactError(self._last_words(late, seconds))
        return bytearray(content)

    def _last_words(self, late: bool, seconds: float) -> str:
        self._process.kill()
        code = self._process.wait()
        if late:
            told = f"it was not done after {seconds:.0f} s"
        elif code == -signal.SIGKILL:
            told = "it was killed, as a system does that is short of memory"
        else:
            told = f"it crashed with signal {-code}" if code < 0 else f"it ended with code {code}"
        return (
            f"'{self._path}' is damaged inside: ExecuTorch ran it in a process of its own, and "
            f"{told}. Export it again, or copy it again if it was transferred."
        )


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("the process has no pipe")
    return stream


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            _pipe(stream).close()


def serve(path: str, memory: int, *methods: str) -> None:
    """Answer requests from stdin until there are no more, in the other process.

    Args:
        path: The `.pte`.
        memory: Bytes that it may take beside what is imported.
        methods: Those that read tokens.
    """
    # Who is interrupted is the process that asks; this one ends when it does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print where they like, and answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    leave_out_the_exporter()
    engine = Here(Path(path), methods)
    threads = (os.cpu_count() or 1) * _MEMORY_PER_THREAD
    bound_further_memory(memory + threads)
    _reply(answers, {})
    for line in sys.stdin.buffer:
        _serve_one(engine, json.loads(line), answers)


def leave_out_the_exporter() -> None:
    """Have ExecuTorch's runtime load what it takes of `exir`, its warnings, without the rest.

    It takes two thirds of the time, and a process that only runs programs has no use for it.
    """
    spec = importlib.util.find_spec("executorch.exir")
    if spec is not None:
        sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))


def _serve_one(engine: Engine, request: dict[str, Any], answers: IO[bytes]) -> None:
    try:
        if not request:
            engine.load()
            _reply(answers, {})
            return
        tokens, start_pos = torch.tensor(request["tokens"]), torch.tensor(request["start_pos"])
        logits = engine.run(request["method"], tokens, start_pos, request["shape"])
    except ArtifactError as error:
        _reply(answers, {"error": str(error)})
        return
    _reply(answers, {}, logits.contiguous().numpy().tobytes())


def _reply(answers: IO[bytes], answer: dict[str, Any], content: bytes = b"") -> None:
    answers.write(json.dumps(answer).encode() + b"\n" + content)
    answers.flush()
