"""Tries cells on this machine, some at once.

for task, outcome in run_here(tasks, jobs=2, heard=print): ...
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from llm_coreml.eval.sweep.attempt import attempt
from llm_coreml.eval.sweep.task import Outcome, Task
from llm_coreml.machine import machine_memory, usable_cores

# Share of the machine's memory that cells may take together.
_MEMORY = 0.9
_LOOK = 0.2

Found = tuple[Task, Outcome]


def run_here(
    tasks: Sequence[Task], jobs: int, heard: Callable[[Task, float], object]
) -> Generator[Found | None, None, None]:
    """Yield each cell with what came of it, as they end, and None now and then.

    To close it ends the cells that run.

    Args:
        tasks: The cells, of which the first begins first.
        jobs: How many run at once. Each may take its part of the machine.
        heard: Told which share of a cell is done, from other threads.
    """
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(_bounded(task, jobs))
    ended: queue.SimpleQueue[Found | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        try:
            while not stopped.is_set():
                task = waiting.get_nowait()
                outcome = attempt(task, functools.partial(heard, task), stopped)
                if outcome is not None:
                    ended.put((task, outcome))
        except queue.Empty:
            return
        except BaseException as error:
            ended.put(error)

    workers = [threading.Thread(target=work, name=f"cell-{at}") for at in range(jobs)]
    try:
        for worker in workers:
            worker.start()
        left = len(tasks)
        while left:
            found = _next(ended)
            left -= found is not None
            yield found
    finally:
        stopped.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()


def _next(ended: queue.SimpleQueue[Found | BaseException]) -> Found | None:
    """Return a cell that ended, None if none does so for a moment."""
    try:
        found = ended.get(timeout=_LOOK)
    except queue.Empty:
        return None
    if isinstance(found, BaseException):
        raise found
    return found


def _bounded(task: Task, jobs: int) -> Task:
    """Return a task with its part of this machine, where its sweep leaves that open."""
    return replace(
        task,
        memory=task.memory or int(_MEMORY * machine_memory() / jobs),
        cores=task.cores or max(1, usable_cores() // jobs),
    )
