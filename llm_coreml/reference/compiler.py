"""From a parsed function to a flat list of steps, done once when a model is loaded.

Constants are decoded, compressed weights are expanded, every operation is looked up, its parameters
and element types are checked, and each value gets a place in a list. What this module accepts can
only fail at run time for a reason that depends on the inputs.

    compiled = compile_function(model.functions["main"])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_coreml.errors import ArtifactError, nearest
from llm_coreml.reference.aliasing import UpdatePlan, plan_updates, tensor_names
from llm_coreml.reference.dtypes import to_tensor
from llm_coreml.reference.mil import (
    Binding,
    Constant,
    Function,
    Operation,
    StateType,
    TensorType,
)
from llm_coreml.reference.ops import OPS, Spec
from llm_coreml.reference.ops.slicing import slice_update_in_place
from llm_coreml.reference.steps import (
    Output,
    Place,
    Step,
    Values,
    bind,
    clone_of,
    copy_of,
    output,
)


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
        shared_outputs: outputs that must be copied before a caller gets them.
    """

    steps: tuple[Step, ...]
    initial: Values
    inputs: dict[str, int]
    states: dict[str, int]
    outputs: dict[str, int]
    types: dict[str, TensorType]
    shared_outputs: frozenset[str]


def compile_function(function: Function) -> Compiled:
    """Compile `function`.

    Raises:
        ArtifactError: an operation is unknown, is called wrongly, or declares what it cannot give.
    """
    return _Compiler(function).compile()


class _Compiler:
    def __init__(self, function: Function) -> None:
        self.function = function
        self.initial: Values = []
        self.slots: dict[str, int] = {}
        self.types: dict[str, TensorType] = {}
        self.constants: dict[str, Constant] = {}
        self.expanded: dict[str, torch.Tensor] = {}
        self.states: set[str] = set()

    def compile(self) -> Compiled:
        for item in self.function.inputs:
            self._declare(item.name, item.type)
            self._place(item.name)
            if isinstance(item.type, StateType):
                self.states.add(item.name)
        runnable: list[Operation] = []
        for operation in self.function.operations:
            if operation.type == "const":
                self._constant(operation)
            elif operation.type.startswith("constexpr_"):
                self._expand(operation)
            else:
                self._known(operation)
                runnable.append(operation)
                for item in operation.outputs:
                    self._declare(item.name, item.type)
                    self._place(item.name)
        reduced = Function(
            self.function.name,
            self.function.opset,
            self.function.inputs,
            self.function.outputs,
            tuple(runnable),
        )
        plan = plan_updates(reduced, self._owned(runnable))
        steps = self._steps(runnable, plan)
        outputs = {name: self._slot(name, "An output") for name in self.function.outputs}
        names = [item.name for item in self.function.inputs]
        return Compiled(
            tuple(steps),
            self.initial,
            {name: self.slots[name] for name in names if name not in self.states},
            {name: self.slots[name] for name in names if name in self.states},
            outputs,
            {name: self.types[name] for name in [*names, *outputs]},
            plan.shared_outputs,
        )

    def _declare(self, name: str, declared: object) -> None:
        if name in self.types:
            raise ArtifactError(f"The program defines '{name}' twice.")
        wrapped = declared.wrapped if isinstance(declared, StateType) else declared
        if not isinstance(wrapped, TensorType):
            raise ArtifactError(f"'{name}' has the type {declared}; only tensors can be computed.")
        self.types[name] = wrapped

    def _place(self, name: str, value: torch.Tensor | None = None) -> int:
        self.slots[name] = len(self.initial)
        self.initial.append(value)
        return self.slots[name]

    def _slot(self, name: str, who: str) -> int:
        """Return the place of `name`, which becomes a tensor if it is a constant."""
        if name not in self.slots:
            self._place(name, self._tensor(name, who))
        return self.slots[name]

    def _known(self, operation: Operation) -> None:
        label = _label(operation)
        if operation.blocks:
            raise ArtifactError(f"{label} has nested blocks; control flow is not supported.")
        if operation.type not in OPS and operation.type not in ("read_state", "write_state"):
            raise ArtifactError(
                f"{label} is not known to the reference runtime."
                f"{nearest(operation.type, OPS)} Add it in llm_coreml/reference/ops."
            )
        if operation.type in OPS and not operation.outputs:
            raise ArtifactError(f"{label} has no results.")
        if operation.type not in OPS:
            self._state(operation)
            if len(operation.outputs) != (operation.type == "read_state"):
                raise ArtifactError(f"{label} has {len(operation.outputs)} results.")

    def _constant(self, operation: Operation) -> None:
        value = operation.attributes.get("val")
        if value is None or len(operation.outputs) != 1:
            raise ArtifactError(f"{_label(operation)} has no value.")
        item = operation.outputs[0]
        if item.type != value.type:
            raise ArtifactError(f"{_label(operation)} declares {item.type} and holds {value.type}.")
        if item.name in self.constants or item.name in self.types:
            raise ArtifactError(f"The program defines '{item.name}' twice.")
        self.constants[item.name] = value
        if isinstance(value.type, TensorType):
            self.types[item.name] = value.type

    def _expand(self, operation: Operation) -> None:
        """Compute a compressed constant now; its inputs are constants by definition."""
        label = _label(operation)
        spec = OPS.get(operation.type)
        if spec is None:
            self._known(operation)
            raise AssertionError("an unknown operation was accepted")
        bindings: dict[str, tuple[Binding, ...]] = {
            **{key: (value,) for key, value in operation.attributes.items()},
            **operation.inputs,
        }
        complete = Operation(operation.type, operation.name, bindings, {}, operation.outputs)
        arguments = self._arguments(complete, spec)
        for name in tensor_names(complete):
            if name not in self.constants and name not in self.expanded:
                raise ArtifactError(f"{label} uses '{name}', which is not a constant.")
        tensors: Values = []
        places: dict[str, Place] = {}
        for key, bound in arguments.tensors.items():
            places[key] = len(tensors)
            tensors.append(self._tensor(bound[0], label))
        for item in operation.outputs:
            self._declare(item.name, item.type)
        first = len(tensors)
        tensors += [None] * len(operation.outputs)
        outputs = self._outputs(operation, spec, arguments, first)
        Step(label, bind(spec.function, places, arguments.plain), outputs, ()).run(tensors)
        for item, expected in zip(operation.outputs, outputs, strict=True):
            self.expanded[item.name] = tensors[expected.slot]

    def _tensor(self, binding: Binding, who: str) -> torch.Tensor:
        if isinstance(binding, str):
            if binding in self.expanded:
                return self.expanded[binding]
            if binding not in self.constants:
                raise ArtifactError(f"{who} uses '{binding}', which nothing defines before.")
            binding = self.constants[binding]
        value = binding.value()
        if not isinstance(value, np.ndarray) or not isinstance(binding.type, TensorType):
            raise ArtifactError(f"{who} uses a {binding.type} as a tensor.")
        return to_tensor(value, binding.type.dtype)

    def _owned(self, operations: list[Operation]) -> frozenset[str]:
        """Return the values that rounding to fp16 copies to fresh memory."""
        return frozenset(
            item.name
            for operation in operations
            if operation.type in OPS and not OPS[operation.type].exact
            for item in operation.outputs
            if self.types[item.name].dtype == "fp16"
        )

    def _steps(self, operations: list[Operation], plan: UpdatePlan) -> list[Step]:
        last: dict[str, int] = {}
        for number, operation in enumerate(operations):
            for name in (*tensor_names(operation), *(item.name for item in operation.outputs)):
                last[name] = number
        held = {*self.constants, *self.expanded}
        kept = {*self.states, *self.function.outputs, *held}
        steps = []
        defined = {item.name for item in self.function.inputs}
        for number, operation in enumerate(operations):
            for name in tensor_names(operation):
                if name in self.slots and name not in defined | held:
                    raise ArtifactError(f"{_label(operation)} uses '{name}' before it exists.")
            defined |= {item.name for item in operation.outputs}
            if number in plan.settled:
                continue
            names = {*tensor_names(operation), *(item.name for item in operation.outputs)}
            frees = tuple(
                self.slots[name]
                for name in sorted(names - kept)
                if last[name] == number and name in self.slots
            )
            steps.append(self._step(operation, number in plan.in_place, frees))
        return steps

    def _step(self, operation: Operation, in_place: bool, frees: tuple[int, ...]) -> Step:
        label = _label(operation)
        if operation.type == "read_state":
            state = self._state(operation)
            item = operation.outputs[0]
            expected = output(self.slots[item.name], self.types[item.name], exact=True)
            return Step(label, copy_of(self.slots[state]), (expected,), frees)
        if operation.type == "write_state":
            state = self._state(operation)
            expected = output(self.slots[state], self.types[state], exact=True)
            data = operation.inputs.get("data", ())
            if len(data) != 1 or not isinstance(data[0], str) or data[0] not in self.types:
                raise ArtifactError(f"{label} has no data.")
            if self.types[data[0]].dtype != self.types[state].dtype:
                raise ArtifactError(
                    f"{label} writes {self.types[data[0]].dtype} to a state of "
                    f"{self.types[state].dtype}."
                )
            return Step(label, clone_of(self._slot(data[0], label)), (expected,), frees)
        spec = OPS[operation.type]
        arguments = self._arguments(operation, spec)
        outputs = self._outputs(operation, spec, arguments, None)
        function = slice_update_in_place if in_place else spec.function
        places: dict[str, Place] = {}
        for key, bound in arguments.tensors.items():
            slots = tuple(self._bound_slot(binding, label) for binding in bound)
            places[key] = slots if spec.parameters[key] == "tensors" else slots[0]
        return Step(label, bind(function, places, arguments.plain), outputs, frees)

    def _state(self, operation: Operation) -> str:
        bound = operation.inputs.get("input", ())
        if len(bound) != 1 or not isinstance(bound[0], str) or bound[0] not in self.states:
            raise ArtifactError(f"{_label(operation)} does not name a state.")
        return bound[0]

    def _bound_slot(self, binding: Binding, who: str) -> int:
        if isinstance(binding, str):
            if binding in self.states:
                raise ArtifactError(f"{who} uses the state '{binding}' without read_state.")
            return self._slot(binding, who)
        self.initial.append(self._tensor(binding, who))
        return len(self.initial) - 1

    def _outputs(
        self, operation: Operation, spec: Spec, arguments: _Arguments, first: int | None
    ) -> tuple[Output, ...]:
        label = _label(operation)
        try:
            given = spec.result(arguments.dtypes, arguments.plain)
        except ArtifactError as error:
            raise ArtifactError(f"{label} {error}.") from error
        except KeyError as error:
            raise ArtifactError(f"{label} has no element type for {error}.") from error
        outputs = []
        for number, item in enumerate(operation.outputs):
            declared = self.types[item.name]
            dtype = given if isinstance(given, str) else given[min(number, len(given) - 1)]
            if declared.dtype != dtype:
                raise ArtifactError(
                    f"{label} declares the result '{item.name}' as {declared}, "
                    f"but its inputs make it {dtype}."
                )
            slot = self.slots[item.name] if first is None else first + number
            outputs.append(output(slot, declared, spec.exact))
        return tuple(outputs)

    def _arguments(self, operation: Operation, spec: Spec) -> _Arguments:
        return _arguments(operation, spec, self.constants, self.types)


@dataclass(frozen=True, eq=False)
class _Arguments:
    tensors: dict[str, tuple[Binding, ...]]
    plain: dict[str, Any]
    dtypes: dict[str, str]


def _arguments(
    operation: Operation,
    spec: Spec,
    constants: Mapping[str, Constant],
    types: Mapping[str, TensorType],
) -> _Arguments:
    """Sort an operation's inputs into tensors and Python values, by what its function expects."""
    label = _label(operation)
    bindings = {
        **{key: (value,) for key, value in operation.attributes.items()},
        **operation.inputs,
    }
    found = _Arguments({}, {}, {})
    for key, bound in bindings.items():
        kind = spec.parameters.get(key)
        if kind is None:
            raise ArtifactError(
                f"{label} has the parameter '{key}', which the reference runtime does not know."
            )
        if kind not in ("tensors", "plains") and len(bound) != 1:
            raise ArtifactError(f"{label} binds '{key}' to {len(bound)} values.")
        dtypes = {_dtype(binding, types, label) for binding in bound} - {None}
        if len(dtypes) > 1:
            raise ArtifactError(f"{label} mixes element types in '{key}'.")
        found.dtypes.update((key, dtype) for dtype in dtypes if dtype is not None)
        held = [constants.get(item) if isinstance(item, str) else item for item in bound]
        if kind in ("tensor", "tensors"):
            found.tensors[key] = bound
        elif all(item is not None for item in held):
            values = [_python(item) for item in held if item is not None]
            found.plain[key] = values if kind == "plains" else values[0]
        elif kind == "dynamic":
            found.tensors[key] = bound
        else:
            raise ArtifactError(f"{label} computes '{key}', which must be a constant.")
    missing = spec.required - set(bindings)
    if missing:
        raise ArtifactError(f"{label} lacks {', '.join(sorted(missing))}.")
    if spec.wants_declared:
        found.plain["declared"] = types[operation.outputs[0].name].dtype
    return found


def _dtype(binding: Binding, types: Mapping[str, TensorType], who: str) -> str | None:
    if isinstance(binding, Constant):
        return binding.type.dtype if isinstance(binding.type, TensorType) else None
    if binding in types:
        return types[binding].dtype
    return None


def _python(constant: Constant) -> Any:
    value = constant.value()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _label(operation: Operation) -> str:
    return f"Operation '{operation.name}' ({operation.type})"
