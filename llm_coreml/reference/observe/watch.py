"""What the values of a run are: how large each result gets, and where inf and NaN begin.

    watch = Watch(program)
    with program.observed(watch):
        program(inputs)
    watch.operations[0].largest

Only figures are kept, one entry for each result of an operation however many calls are watched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llm_coreml.reference.observe.series import Series
from llm_coreml.reference.program.coreml_program import CoreMLProgram
from llm_coreml.reference.program.steps import Step, Values

FP16_MAX = 65504.0
# An operation that ends a layer's attention, fused or decomposed.
ATTENTION = frozenset({"scaled_dot_product_attention", "softmax"})
# Masks are made of constants of this size; activations that large are near their end anyhow.
_FILL = 1e4


@dataclass
class Observed:
    """One result of an operation, over all calls.

    Attributes:
        name: the value's name in the program.
        type: the operation's type.
        layer: how many attention operations come before it.
        dtype: the element type that the program declares.
        largest: largest finite magnitude, without elements that come from a mask's constant.
        grows: the largest is more than each operand's, so that it is made here and not passed on.
        begins: `inf` and `nan`, where the result had them in some call and no operand did.
    """

    name: str
    type: str
    layer: int
    dtype: str
    largest: float = 0.0
    grows: bool = False
    begins: tuple[str, ...] = ()

    @property
    def headroom(self) -> float:
        """How many times larger the largest could be in fp16; infinite for a result of zeros."""
        return FP16_MAX / self.largest if self.largest else math.inf


@dataclass(frozen=True)
class _Facts:
    """Largest finite magnitude of a tensor, and which of `inf` and `nan` are in it."""

    largest: float
    kinds: frozenset[str] = frozenset()


class Watch:
    """An observer, see `CoreMLProgram.observed`, that notes each floating-point result's size.

    Args:
        program: what will be observed.

    Attributes:
        operations: results in the order of the program.
    """

    def __init__(self, program: CoreMLProgram | Series) -> None:
        self._constants = program.constant_places
        self._of_constant: dict[int, _Facts] = {}
        self._of_result: dict[int, _Facts] = {}
        self._fills: dict[int, float] = {}
        self._entries: dict[tuple[str, str], Observed] = {}
        self._layer = 0

    @property
    def operations(self) -> tuple[Observed, ...]:
        """Results in the order of the program."""
        return tuple(self._entries.values())

    def __call__(self, step: Step, values: Values) -> None:
        """Note what `step` has just computed."""
        new = False
        for output in step.outputs:
            value = values[output.slot]
            key = (step.label, output.name)
            if not value.is_floating_point():
                continue
            if key not in self._entries:
                new = True
                self._entries[key] = Observed(
                    output.name, step.type, self._layer, output.declared.dtype
                )
            self._note(self._entries[key], step, values, output.slot)
        if new and step.type in ATTENTION:
            self._layer += 1

    def _note(self, entry: Observed, step: Step, values: Values, slot: int) -> None:
        operands = {place: self._operand(place, values) for place in step.operands()}
        found = self._without_fill(_facts(values[slot]), step, values, slot, operands)
        # A state may be reset or restored before it is read again.
        if step.type != "write_state":
            self._of_result[slot] = found
        computed = [
            facts.largest for place, facts in operands.items() if place not in self._constants
        ]
        if found.largest > entry.largest:
            entry.largest = found.largest
            entry.grows = found.largest > max(computed, default=0.0)
        had = {kind for facts in operands.values() for kind in facts.kinds}
        begun = (found.kinds - had) | set(entry.begins)
        entry.begins = tuple(sorted(begun))

    def _operand(self, place: int, values: Values) -> _Facts:
        if place in self._constants:
            if place not in self._of_constant:
                self._of_constant[place] = _facts(values[place])
            return self._of_constant[place]
        return self._of_result.get(place) or _facts(values[place])

    def _without_fill(
        self, found: _Facts, step: Step, values: Values, slot: int, operands: dict[int, _Facts]
    ) -> _Facts:
        """Leave a mask's constant out of the largest magnitude, wherever it has flowed."""
        numbers = [item for item in step.call.fixed.values() if isinstance(item, float)]
        constants = [facts.largest for at, facts in operands.items() if at in self._constants]
        # A mask is added, chosen or multiplied by zeros and ones: its size hardly changes.
        fills = [
            size
            for size in (*map(abs, numbers), *constants)
            if _FILL <= size < math.inf and abs(found.largest - size) <= size / 8
        ]
        fills += [self._fills[place] for place in operands if place in self._fills]
        self._fills.pop(slot, None)
        if not fills or found.largest < min(fills) / 2:
            return found
        self._fills[slot] = min(fills)
        sizes = values[slot].abs()
        rest = sizes[sizes < min(fills) / 2]
        return _Facts(float(rest.max()) if rest.numel() else 0.0, found.kinds)


def _facts(value: object) -> _Facts:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return _Facts(0.0)
    low, high = (float(item) for item in torch.aminmax(value))
    if math.isfinite(low) and math.isfinite(high):
        return _Facts(max(abs(low), abs(high)))
    finite = value[torch.isfinite(value)].abs()
    kinds = {"inf"} if bool(torch.isinf(value).any()) else set()
    kinds |= {"nan"} if bool(torch.isnan(value).any()) else set()
    return _Facts(float(finite.max()) if finite.numel() else 0.0, frozenset(kinds))
