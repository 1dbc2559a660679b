"""An export and its evaluation in a process of their own, with bounds on memory and time.

running = ExportProcess(order, Path("scratch"), bounds)
while not running.ended: ...
running.failure()                    # None, or a clause that says what went wrong

The other process ends by itself when its time is over, and when this one is gone.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llm_coreml.config import ExportConfig
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.own_process import at_end_of_stdin, bound_further_memory, python_command
from llm_coreml.printable import MESSAGE, printable

_ORDER, _REPLY, _WORDS = "order.json", "reply.json", "stderr"
# What tells a process that it is one of many that train; this one is not.
_OF_THE_TRAINING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK",
                    "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
_NICER = 10


@dataclass(frozen=True)
class Order:
    """What is exported, and what it is measured on.

    Attributes:
        model: Folder of the model.
        output: Folder of the bundle, to be made.
        config: Settings of the export.
        text: UTF-8 file; None takes the held-out text that ships in the package.
        tokens: Most tokens to score.
    """

    model: Path
    output: Path
    config: ExportConfig
    text: str | None
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        places = {"model": str(self.model.absolute()), "output": str(self.output.absolute())}
        rest = {"config": self.config.to_json(), "text": self.text, "tokens": self.tokens}
        return {**places, **rest}


@dataclass(frozen=True)
class Bounds:
    """What the other process may take.

    Attributes:
        memory: Bytes that it allocates; mapped files do not count. macOS does not bound them.
        seconds: Time by the clock.
        nice: It gives way to this process.
    """

    memory: int
    seconds: float
    nice: bool


class ExportProcess:
    """A process that fulfils an order."""

    def __init__(self, order: Order, scratch: Path, bounds: Bounds) -> None:
        """Start it.

        Raises:
            OSError: it cannot be started.
        """
        self._bounds, self._scratch = bounds, scratch
        (scratch / _ORDER).write_text(json.dumps(order.to_json()), encoding="utf-8")
        command = python_command(
            __name__, "serve", str(scratch.absolute()), bounds.memory, math.ceil(bounds.seconds),
            _NICER if bounds.nice else 0,
        )  # fmt: skip
        kept = {name: each for name, each in os.environ.items() if name not in _OF_THE_TRAINING}
        with (scratch / _WORDS).open("wb") as words:
            # Its standard input is open for as long as this process lives.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=words,
                env={**kept, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
            )

    @property
    def ended(self) -> bool:
        """Whether it is done, well or not."""
        return self._process.poll() is not None

    def wait(self) -> None:
        """Wait until it is done, which is at the latest when its time is over."""
        self._process.wait()

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._close()

    def failure(self) -> str | None:
        """Return why there is no bundle, as a clause; None if there is one. It has ended."""
        self._close()
        code, reply = self._process.returncode, self._scratch / _REPLY
        if reply.is_file():
            found = json.loads(reply.read_text(encoding="utf-8"))["failure"]
            return None if found is None else str(found)
        if code == -signal.SIGALRM:
            return f"it was not done after {self._bounds.seconds:g} s, which timeout= allows"
        last = (self._scratch / _WORDS).read_text(errors="replace").strip().splitlines()[-1:]
        told = printable(last[0], MESSAGE) if last else "and said nothing"
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"its process {how} ({told}); {_bound(self._bounds.memory)}"

    def _close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()


def _bound(memory: int) -> str:
    return f"it may allocate {memory:,} bytes, as memory= says"


def serve(scratch: str, memory: int, seconds: int, nicer: int) -> NoReturn:
    """Fulfil the order in `scratch`, in the other process."""
    at_end_of_stdin(functools.partial(os._exit, 1))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    os.nice(nicer)
    bound_further_memory(memory)
    place = Path(scratch)
    order = json.loads((place / _ORDER).read_text(encoding="utf-8"))
    reply = json.dumps({"failure": fulfil(order, memory)})
    (place / f"{_REPLY}.draft").write_text(reply, encoding="utf-8")
    (place / f"{_REPLY}.draft").rename(place / _REPLY)
    # Whatever a library still does at its end cannot change the answer.
    os._exit(0)


def fulfil(order: dict[str, Any], memory: int) -> str | None:
    """Export and evaluate; return what went wrong as a clause, or None.

    Args:
        order: An `Order` as JSON.
        memory: The bound, for a message.
    """
    try:
        from llm_coreml.eval.evaluate import evaluate
        from llm_coreml.pipeline import export

        config = ExportConfig.from_json(order["config"])
        # Weights of a training are never seen again: nothing of them is kept for later exports.
        export(order["model"], output=order["output"], config=config, cache=False)
        evaluate(order["output"], model=order["model"], text=order["text"], tokens=order["tokens"])
    except LlmCoreMLError as error:
        return str(error)
    # Libraries in C that are given no memory end in either.
    except (MemoryError, SystemError):
        return f"memory ran out: {_bound(memory)}"
    # What ends here is told to a training that goes on: nothing may be lost on the way.
    except Exception as error:
        first = printable(next(iter(str(error).splitlines()), ""), MESSAGE)
        alloc = "alloc" in first
        return f"{type(error).__name__}: {first}" + (f"; {_bound(memory)}" if alloc else "")
    return None
