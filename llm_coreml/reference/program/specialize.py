"""What is left to do in a call once the shapes of its inputs are known.

Much of a program computes sizes: the shape of an input, the end of a slice, a target of a reshape.
For given input shapes these values are the same in every call, and so are the shapes of nearly all
others. After one checked call a specialized program holds the former as constants and checks only
the shapes that data may still decide; what it computes is the same.

    known = analyse(compiled)
    specialized = specialize(compiled, known, values_seen)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from llm_coreml.reference.program.compiler import Compiled
from llm_coreml.reference.program.fusion import fused
from llm_coreml.reference.program.steps import Step, Values


@dataclass(frozen=True)
class Known:
    """What the input shapes decide.

    Attributes:
        values: places whose value they decide.
        shapes: places whose shape they decide; includes `values`.
    """

    values: frozenset[int]
    shapes: frozenset[int]

    def settles(self, step: Step) -> bool:
        """Return whether the shapes of all of the step's results are decided."""
        return all(output.slot in self.shapes for output in step.outputs)


def analyse(compiled: Compiled) -> Known:
    """Find what the input shapes alone decide, from the steps, without running them."""
    constant = {slot for slot, value in enumerate(compiled.initial) if value is not None}
    values = set(constant)
    shapes = constant | set(compiled.inputs.values()) | set(compiled.states.values())
    for step in compiled.steps:
        operands = set(step.operands())
        results = {output.slot for output in step.outputs}
        sizes = {step.call.places[key] for key in step.call.dynamic & step.call.places.keys()}
        # A loop's or a branch's results depend on data, as do places of non-zero elements.
        if step.call.sizes_from_data or not operands <= shapes or not sizes <= values:
            shapes -= results
            values -= results
            continue
        shapes |= results
        if step.type == "shape" or operands <= values:
            values |= results - set(compiled.states.values())
    return Known(frozenset(values), frozenset(shapes))


@dataclass(frozen=True, eq=False)
class Specialized:
    """A function for given input shapes.

    Attributes:
        initial: the values before the first step.
        run: executes the remaining steps over the values.
    """

    initial: Values
    run: Callable[[Values], None]


def specialize(
    function: Compiled, known: Known, seen: Mapping[int, torch.Tensor], *, compiled: bool = False
) -> Specialized:
    """Return what is left of a function for the shapes of a call.

    Args:
        function: the function.
        known: what `analyse` found.
        seen: place to value, from a checked call, for results in `known.values`; what is absent
            is computed in every call.
        compiled: compile runs of operations, see `fusion`.
    """
    initial = function.initial.copy()
    for slot, value in seen.items():
        initial[slot] = value
    steps: list[Step] = []
    unused: list[int] = []
    for step in function.steps:
        results = {output.slot for output in step.outputs}
        # What a step that is left out was the last to use is freed by the next one.
        unused += [slot for slot in step.frees if slot not in seen]
        if not results <= seen.keys():
            steps.append(replace(_with_numbers(step, seen), frees=tuple(unused)))
            unused = []

    def single(step: Step) -> Callable[[Values], None]:
        return _unchecked(step) if known.settles(step) else _checked(step)

    parts = fused(steps, initial, known.settles, single) if compiled else list(map(single, steps))

    def run(values: Values) -> None:
        for part in parts:
            part(values)

    return Specialized(initial, run)


def _with_numbers(step: Step, seen: Mapping[int, torch.Tensor]) -> Step:
    """Return `step` with computed sizes that are known by now as plain numbers."""
    numbers = {
        key: seen[place].tolist()
        for key, place in step.call.places.items()
        if key in step.call.dynamic and isinstance(place, int) and place in seen
    }
    if not numbers:
        return step
    places = {key: place for key, place in step.call.places.items() if key not in numbers}
    call = replace(step.call, places=places, fixed={**step.call.fixed, **numbers})
    return replace(step, call=call, compute=call.bind())


def _checked(step: Step) -> Callable[[Values], None]:
    def run(values: Values) -> None:
        step.run(values)
        for slot in step.frees:
            values[slot] = None

    return run


def _unchecked(step: Step) -> Callable[[Values], None]:
    """Return what `step` does, without a look at the shapes, which an earlier call has proved."""
    compute, frees = step.guarded, step.frees
    slots = tuple(output.slot for output in step.outputs)
    (slot, *others) = slots
    rounds = step.outputs[0].dtype is torch.float16

    def run(values: Values) -> None:
        result = compute(values)
        if isinstance(result, (tuple, list)):
            (result,) = result
        if rounds and result.dtype is torch.float32:
            result = result.to(torch.float16)
        values[slot] = result
        for free in frees:
            values[free] = None

    def run_several(values: Values) -> None:
        for output, result in zip(step.outputs, compute(values), strict=True):
            values[output.slot] = output.rounded(result)
        for free in frees:
            values[free] = None

    return run_several if others else run
