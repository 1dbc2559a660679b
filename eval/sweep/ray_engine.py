"""Tries cells on a Ray cluster: the same process for each, started by a worker of Ray's.

for task, outcome in run_on_ray(tasks, address="auto", heard=print): ...

Every node has this package, and sees models and texts under the same paths. What came of a cell
travels back to whoever asks. A worker or a node that dies loses nothing: Ray has its cells tried
again elsewhere, and the process of a cell ends with the worker that started it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from llm_coreml.drafts import ENDING
from llm_coreml.errors import ConfigError
from llm_coreml.eval.sweep.attempt import attempt
from llm_coreml.eval.sweep.local_engine import Found
from llm_coreml.eval.sweep.task import Outcome, Task, failed

INSTALL = "pip install 'llm-coreml[ray]'"
LOCAL = "local"
# How often a cell is tried again whose worker or node has died.
_TRIES = 5
_LOOK = 0.5


def check_installed() -> None:
    """Refuse to go on without Ray.

    Raises:
        ConfigError: as said.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Ray is not installed ({error}); get it by {INSTALL}.") from None


def run_on_ray(
    tasks: Sequence[Task], address: str, heard: Callable[[Task, float], object]
) -> Generator[Found | None, None, None]:
    """Yield each cell with what came of it, as they end, and None now and then.

    To close it ends the cells that run.

    Args:
        tasks: The cells.
        address: Of a cluster, `auto` for the one that this machine belongs to, or `local` for one
            that is started here and ends with this.
        heard: Told which share of a cell is done; a cell on a cluster tells of its end alone.

    Raises:
        ConfigError: there is no such cluster, or Ray is not installed.
    """
    check_installed()
    import ray

    with _connected(address):
        remote = ray.remote(_try)
        running = {}
        for task in tasks:
            takes = {"num_cpus": task.cores or 1, "memory": task.memory}
            running[remote.options(max_retries=_TRIES, **takes).remote(task)] = task
        try:
            while running:
                ready, _ = ray.wait(list(running), timeout=_LOOK)
                yield None
                for reference in ready:
                    task = running.pop(reference)
                    heard(task, 1.0)
                    yield task, _result(reference)
        finally:
            for reference in running:
                ray.cancel(reference)
            if running:
                # A worker ends its cell's process, which cleans up, before it is done itself.
                ray.wait(list(running), num_returns=len(running), timeout=30.0)


def _try(task: Task) -> Outcome:
    """Try a cell; this is what a worker of Ray's runs."""
    outcome = attempt(task, lambda _: None, threading.Event())
    if outcome is None:
        raise RuntimeError("nobody stops it")
    return outcome


def _result(reference: Any) -> Outcome:
    import ray

    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        return failed(f"Ray lost it {_TRIES + 1} times: {told[0]}", 1, 0.0)
    return outcome


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connect to a cluster while the block lasts; its handlers of signals do not stay."""
    import ray

    if ray.is_initialized():  # by a host program, which also ends it
        yield
        return
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in ENDING} if in_main else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TQDM_PATCH_PRINT", "0")  # `print` stays Python's own
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"There is no Ray cluster at '{address}' ({told[0]}); start one with ray start --head, "
            f"or give --ray {LOCAL}."
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()
