"""From a parsed function to a flat list of steps, done once when a model is loaded.

Constants are decoded, compressed weights are expanded, every operation is looked up, its parameters
and element types are checked, and each value gets a place in a list. What this module accepts can
only fail at run time for a reason that depends on the inputs.

    compiled = compile_function(model.functions["main"], pool)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_coreml.artifact.mil import (
    Binding,
    Constant,
    Function,
    Operation,
    TensorType,
)
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops import Spec
from llm_coreml.reference.ops.slicing import slice_update_in_place
from llm_coreml.reference.program.aliasing import StateUpdates, choose_updates
from llm_coreml.reference.program.arguments import Arguments, arguments, label, result_types
from llm_coreml.reference.program.constants import ConstantPool, PackedWeight, Source
from llm_coreml.reference.program.control import CONTROL, Rounds, branches, loop
from llm_coreml.reference.program.definitions import definitions, nested
from llm_coreml.reference.program.packed_weights import packed_function
from llm_coreml.reference.program.steps import Call, Output, Place, Step, Values, output

Hold = Callable[..., Any]
_SIZES_FROM_DATA = frozenset({"non_zero"})
# A constant of more elements exists in one form only, even where both fp16 and fp32 would serve.
_LARGE = 1 << 20


@dataclass(frozen=True, eq=False)
class Compiled:
    """A function, ready to run.

    Attributes:
        steps: in order.
        initial: the values before the first step, constants in place and None elsewhere.
        inputs: name to place.
        states: name to place.
        outputs: name to place.
        types: declared types of inputs, states and outputs.
        rounds: how often the loops of a call may still run.
        constants: place to name, of the constants that have one.
        in_place: whether states are written nowhere but in place.
    """

    steps: tuple[Step, ...]
    initial: Values
    inputs: dict[str, int]
    states: dict[str, int]
    outputs: dict[str, int]
    types: dict[str, TensorType]
    rounds: Rounds
    constants: dict[int, str]
    in_place: bool


def compile_function(function: Function, pool: ConstantPool) -> Compiled:
    """Compile `function`, whose constants `pool` holds.

    Raises:
        ArtifactError: an operation is unknown, is called wrongly, or declares what it cannot give.
    """
    return _Compiler(function, pool).compile()


class _Compiler:
    def __init__(self, function: Function, pool: ConstantPool) -> None:
        self.pool = pool
        self.ops = pool.numerics.ops
        found = definitions(function, self.ops)
        self.function, self.states = found.function, found.states
        self.types, self.constants = found.types, found.constants
        self.initial: Values = []
        self.slots = {name: self._place(None) for name in self.types if name not in self.constants}
        self.constant_slots: dict[tuple[str, bool, Hold], int] = {}
        self.wide: set[str] = set()
        self.rounds = Rounds()

    def compile(self) -> Compiled:
        operations = self.function.operations
        for operation in nested(operations):
            if self._widens(operation):
                self.wide |= self.constants.keys() & set(operation.names())
        updates = choose_updates(self.function, self._owned(operations))
        steps = self._steps(operations, updates)
        outputs = {name: self._slot(name, False, "An output") for name in self.function.outputs}
        names = [item.name for item in self.function.inputs]
        return Compiled(
            tuple(steps),
            self.initial,
            {name: self.slots[name] for name in names if name not in self.states},
            {name: self.slots[name] for name in names if name in self.states},
            outputs,
            {name: self.types[name] for name in [*names, *outputs]},
            self.rounds,
            {slot: name for (name, *_), slot in self.constant_slots.items()},
            all(
                number in updates.settled
                for number, operation in enumerate(operations)
                if operation.type == "write_state" or operation.type in CONTROL
            ),
        )

    def _place(self, value: Any) -> int:
        self.initial.append(value)
        return len(self.initial) - 1

    # Constants as tensors.

    def _widens(self, operation: Operation) -> bool:
        """Whether the operation gets its fp16 operands as fp32."""
        spec = self.ops.get(operation.type)
        if spec is None:
            return False
        # A large constant that another operation needs as fp32 is not kept twice.
        return not spec.half or any(
            name in self.wide and _size(self.constants[name]) > _LARGE for name in operation.names()
        )

    def _slot(self, binding: Binding, wide: bool, who: str, hold: Hold | None = None) -> int:
        """Return the place of a value; a constant becomes what `hold` gives, a tensor if None."""
        hold = hold or self.pool.tensor
        if isinstance(binding, Constant):
            return self._place(hold(binding, wide=wide))
        if binding in self.states:
            raise ArtifactError(f"{who} uses the state '{binding}' without read_state.")
        if binding in self.slots:
            return self.slots[binding]
        if binding not in self.constants:
            raise ArtifactError(f"{who} uses '{binding}', which nothing defines before.")
        key = (binding, wide, hold)
        if key not in self.constant_slots:
            held = hold(self.constants[binding], wide=wide)
            self.constant_slots[key] = self._place(held)
        return self.constant_slots[key]

    def _owned(self, operations: Sequence[Operation]) -> frozenset[str]:
        """Return the values that rounding to fp16 copies to fresh memory."""
        return frozenset(
            item.name
            for operation in operations
            if self.pool.numerics.halves and operation.type in self.ops and self._widens(operation)
            for item in operation.outputs
            if self.types[item.name].dtype == "fp16"
        )

    # Steps.

    def _steps(self, operations: Sequence[Operation], updates: StateUpdates) -> list[Step]:
        last: dict[str, int] = {}
        for number, operation in enumerate(operations):
            for name in (*operation.names(), *(item.name for item in operation.outputs)):
                last[name] = number
        kept = {*self.states, *self.function.outputs}
        steps = []
        for number, operation in enumerate(operations):
            if number in updates.settled:
                continue
            names = {*operation.names(), *(item.name for item in operation.outputs)}
            frees = tuple(
                self.slots[name]
                for name in sorted(names - kept)
                if last[name] == number and name in self.slots
            )
            steps.append(self._step(operation, number in updates.in_place, frees))
        return steps

    def _step(
        self, operation: Operation, in_place: bool = False, frees: tuple[int, ...] = ()
    ) -> Step:
        who = label(operation)
        if operation.type == "read_state":
            state = self._state(operation)
            call = Call(_same, {"x": self.slots[state]}, {})
            return self._finish(operation, call, self._outputs(operation), frees)
        if operation.type == "write_state":
            return self._write(operation, frees)
        if operation.type in CONTROL:
            return self._control(operation, frees)
        spec = self.ops[operation.type]
        given = arguments(operation, spec, self.constants, self.types)
        result_types(operation, spec, given)
        wide = self._widens(operation)
        places: dict[str, Place] = {}
        for key, bound in given.tensors.items():
            if spec.parameters[key] == "tensors":
                places[key] = tuple(self._slot(binding, wide, who) for binding in bound)
            else:
                places[key] = self._slot(bound[0], wide, who, self.pool.held)
        fixed = {**given.plain, **self._supplied(operation, spec)}
        function = slice_update_in_place if in_place else spec.function
        packed = self._packed(places)
        if packed:
            function = packed_function(operation.type, function, packed, fixed)
        call = Call(
            function,
            places,
            fixed,
            # A widened state would be a copy, and the update of the copy would be lost.
            self._widened(given) - packed if wide and not in_place else frozenset(),
            frozenset(key for key, kind in spec.parameters.items() if kind == "dynamic"),
            operation.type in _SIZES_FROM_DATA,
        )
        return self._finish(operation, call, self._outputs(operation), frees)

    def _finish(
        self, operation: Operation, call: Call, outputs: tuple[Output, ...], frees: tuple[int, ...]
    ) -> Step:
        return Step(label(operation), operation.type, call, call.bind(), outputs, frees)

    def _outputs(self, operation: Operation) -> tuple[Output, ...]:
        return tuple(
            output(item.name, self.slots[item.name], self.types[item.name], self.pool.numerics)
            for item in operation.outputs
        )

    def _widened(self, given: Arguments) -> frozenset[str]:
        """Return the parameters whose fp16 values are computed, so that they arrive as fp16."""
        return frozenset(
            key
            for key, bound in given.tensors.items()
            if given.dtypes.get(key) == "fp16"
            and self.pool.numerics.halves
            and any(isinstance(item, str) and item in self.slots for item in bound)
        )

    def _supplied(self, operation: Operation, spec: Spec) -> dict[str, Any]:
        supplied: dict[str, Any] = {}
        if "declared" in spec.supplied:
            supplied["declared"] = self.types[operation.outputs[0].name].dtype
        if "device" in spec.supplied:
            supplied["device"] = self.pool.device
        return supplied

    def _packed(self, places: dict[str, Place]) -> frozenset[str]:
        return frozenset(
            key
            for key, place in places.items()
            if isinstance(place, int) and isinstance(self.initial[place], PackedWeight)
        )

    def _write(self, operation: Operation, frees: tuple[int, ...]) -> Step:
        who, state = label(operation), self._state(operation)
        data = operation.inputs.get("data", ())
        if len(data) != 1 or not isinstance(data[0], str) or data[0] not in self.types:
            raise ArtifactError(f"{who} has no data.")
        if self.types[data[0]].dtype != self.types[state].dtype:
            raise ArtifactError(
                f"{who} writes {self.types[data[0]].dtype} to a state of {self.types[state].dtype}."
            )
        call = Call(_copy, {"x": self._slot(data[0], False, who)}, {})
        expected = output(state, self.slots[state], self.types[state], self.pool.numerics)
        return self._finish(operation, call, (expected,), frees)

    def _state(self, operation: Operation) -> str:
        bound = operation.inputs.get("input", ())
        if len(bound) != 1 or not isinstance(bound[0], str) or bound[0] not in self.states:
            raise ArtifactError(f"{label(operation)} does not name a state.")
        return bound[0]

    def _control(self, operation: Operation, frees: tuple[int, ...]) -> Step:
        who = label(operation)
        first, second = (
            (
                tuple(self._step(inner) for inner in block.operations),
                tuple(self._slot(name, False, who) for name in block.outputs),
                tuple(self.slots[item.name] for item in block.inputs),
            )
            for block in operation.blocks
        )
        given = [
            tuple(self._slot(item, False, who) for item in bound)
            for key, bound in sorted(operation.inputs.items())
        ]
        if len(given) != 1:
            raise ArtifactError(f"{who} takes one input, not {len(given)}.")
        if operation.type == "cond":
            compute = branches(given[0], first, second)
        else:
            compute = loop(given[0], first, second, self.rounds)
        call = Call(_same, {"x": given[0]}, {}, sizes_from_data=True)
        return Step(who, operation.type, call, compute, self._outputs(operation), frees)


def _same(x: Any) -> Any:
    return x


def _copy(x: Any) -> Any:
    return x.clone()


def _size(source: Source) -> int:
    declared = source.type
    if not isinstance(declared, TensorType):
        return 0
    total = 1
    for size in declared.shape:
        total *= size or 0
    return total
