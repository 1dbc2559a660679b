"""Python in a process of its own, for foreign data that may crash, hang or fill its memory.

command = python_command("llm_coreml.tokenizer.apart", "serve", "trial")
subprocess.run(command, ...)
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_PIECE = 1 << 16


def python_command(module: str, function: str, *arguments: int | str) -> list[str]:
    """Return the command line that calls `function(*arguments)` of `module`.

    It finds the same modules as this process, in the same places, and nothing in the current
    folder.
    """
    given = ", ".join(map(repr, arguments))
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path[:] = {sys.path!r}; sys.dont_write_bytecode = True; "
        f"from {module} import {function}; {function}({given})",
    ]


def at_end_of_stdin(act: Callable[[], None]) -> None:
    """Call `act` when stdin ends, which is at the latest when the process that holds it does.

    It is called in a thread. Python's own reader would be locked while that waits, and a forked
    process, which closes it before it begins, would wait for it for ever.
    """

    def wait() -> None:
        while os.read(0, _PIECE):
            pass
        act()

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def bound_memory(nbytes: int) -> None:
    """Let this process take `nbytes` of address space in all, and leave no core file behind."""
    _bound(resource.RLIMIT_AS, nbytes)
    _bound(resource.RLIMIT_CORE, 0)


def bound_time(seconds: float) -> None:
    """Let this process compute for so many seconds, rounded up; SIGXCPU ends it then."""
    _bound(resource.RLIMIT_CPU, math.ceil(seconds))


def bound_further_memory(nbytes: int) -> None:
    """Let this process take `nbytes` more than now, and leave no core file behind.

    What is only reserved does not count, nor do mapped files; systems that do not tell how much a
    process has do not bound it.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        _bound(resource.RLIMIT_DATA, pages * resource.getpagesize() + nbytes)
    _bound(resource.RLIMIT_CORE, 0)


def _bound(kind: int, limit: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(kind)
        bounded = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bounded, hard))
