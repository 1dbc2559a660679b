"""Programs that run one after the other in every call, observed as if they were one.

    series = Series(method.in_a_row)
    with series.observed(observe):
        method.run(tokens, start_pos)

Places of values are each program's own, so they are shifted by the program's number; what a program
takes of the one before it has the place that it has there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from llm_coreml.artifact.description import HIDDEN
from llm_coreml.reference.program.coreml_program import CoreMLProgram
from llm_coreml.reference.program.steps import Observer, Place, Step, Values

# More values than any program has.
_STRIDE = 1 << 32


class Series:
    """Programs in the order in which they run.

    Args:
        programs: Each takes `hidden` from the first output of the one before it, if it takes that.
    """

    def __init__(self, programs: Sequence[CoreMLProgram]) -> None:
        self._programs = tuple(programs)
        self._links: list[dict[int, int]] = [{} for _ in programs]
        for number, program in enumerate(self._programs[1:], 1):
            before, (inputs, _) = self._programs[number - 1], program.borders
            if HIDDEN in inputs and before.outputs:
                given = before.borders[1][before.outputs[0].name]
                self._links[number][inputs[HIDDEN]] = given + (number - 1) * _STRIDE

    @property
    def constant_places(self) -> frozenset[int]:
        """The places among an observer's values that hold constants."""
        return frozenset(
            place + number * _STRIDE
            for number, program in enumerate(self._programs)
            for place in program.constant_places
        )

    @contextmanager
    def observed(self, observe: Observer) -> Iterator[None]:
        """Do what `CoreMLProgram.observed` does, for all of them."""
        with ExitStack() as stack:
            for number, program in enumerate(self._programs):
                shifted = _Shifted(number, self._links[number], observe)
                stack.enter_context(program.observed(shifted))
            yield


class _Shifted:
    """An observer of one program that tells another one of it, with shifted places."""

    def __init__(self, number: int, links: Mapping[int, int], observe: Observer) -> None:
        self._number = number
        self._links = links
        self._own = {place: slot for slot, place in links.items()}
        self._observe = observe

    def __call__(self, step: Step, values: Values) -> None:
        places: dict[str, Place] = {
            name: tuple(map(self._place, slot)) if isinstance(slot, tuple) else self._place(slot)
            for name, slot in step.call.places.items()
        }
        outputs = tuple(replace(each, slot=self._place(each.slot)) for each in step.outputs)
        label = f"partition {self._number}, {step.label}"
        call = replace(step.call, places=places)
        found: Any = _Values(self._number * _STRIDE, self._own, values)
        self._observe(replace(step, label=label, call=call, outputs=outputs), found)

    def _place(self, slot: int) -> int:
        return self._links.get(slot, slot + self._number * _STRIDE)


class _Values:
    """Values of one program, found by shifted places."""

    def __init__(self, shift: int, own: Mapping[int, int], values: Values) -> None:
        self._shift = shift
        self._own = own
        self._values = values

    def __getitem__(self, place: int) -> Any:
        return self._values[self._own.get(place, place - self._shift)]
