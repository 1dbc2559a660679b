"""Run two programs side by side, so that their values can be compared without being kept.

    lockstep = Lockstep(first, second, pairs, compare)
    lockstep.run(lambda: first(inputs), lambda: second(inputs))

Each program computes in a thread of its own and waits at every paired operation for the other, so
that no more is held than what the two hold anyway, whatever their length.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llm_coreml.reference.observe.series import Series
from llm_coreml.reference.program.coreml_program import CoreMLProgram
from llm_coreml.reference.program.steps import Observer, Step, Values

First = TypeVar("First")
Second = TypeVar("Second")
# Called with the operation's position in the first program and its results in both.
Compare = Callable[[int, list[torch.Tensor], list[torch.Tensor]], None]


class _AbandonedError(Exception):
    """The other program has failed."""


@dataclass(frozen=True)
class _Ended:
    """What the second program's call gave: a result or an error."""

    result: Any = None
    error: BaseException | None = None


class Lockstep:
    """Two programs whose paired operations are compared.

    Args:
        first: one program.
        second: the other.
        pairs: positions of operations, ascending in both, see `alignment.align`.
        compare: called at each pair.
        watches: an observer of each program that is called at every operation.
    """

    def __init__(
        self,
        first: CoreMLProgram | Series,
        second: CoreMLProgram | Series,
        pairs: Sequence[tuple[int, int]],
        compare: Compare,
        watches: tuple[Observer, Observer],
    ) -> None:
        self._programs = first, second
        self._stops = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
        self._compare = compare
        self._watches = watches

    def run(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
        """Call both, each of which runs its program once, and return their results.

        Raises:
            ArtifactError: either program fails.
        """
        offers: queue.Queue[list[torch.Tensor] | _Ended] = queue.Queue()
        resume = threading.Semaphore(0)
        abandoned = threading.Event()

        def offer(_: int, results: list[torch.Tensor]) -> None:
            offers.put(results)
            resume.acquire()
            if abandoned.is_set():
                raise _AbandonedError

        def meet(position: int, results: list[torch.Tensor]) -> None:
            other = offers.get()
            if isinstance(other, _Ended):
                raise other.error or AssertionError("the second program ended early")
            self._compare(position, results, other)
            resume.release()

        def work() -> None:
            try:
                offers.put(_Ended(self._observed(1, second, offer)))
            except BaseException as error:
                offers.put(_Ended(error=error))

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            result = self._observed(0, first, meet)
            ended = offers.get()
        finally:
            abandoned.set()
            resume.release()
            worker.join()
        assert isinstance(ended, _Ended), "the second program has more pairs than the first"
        if ended.error is not None:
            raise ended.error
        return result, ended.result

    def _observed(
        self, number: int, call: Callable[[], First], stop: Callable[[int, list[Any]], None]
    ) -> First:
        stops, watch, position = self._stops[number], self._watches[number], 0

        def observe(step: Step, values: Values) -> None:
            nonlocal position
            watch(step, values)
            if position in stops:
                stop(position, [values[output.slot] for output in step.outputs])
            position += 1

        with self._programs[number].observed(observe):
            return call()
