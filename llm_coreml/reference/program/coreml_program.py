"""Run one function of a Core ML model on any machine.

Values that the program declares fp16 are rounded to fp16 after each operation and computed in fp32
in between; fp32 stays fp32; integers and bools are exact. After each operation the result's element
type, rank and known sizes must be what the program declares.

    program = load("model.pte")
    outputs = program({"tokens": torch.zeros(1, 8, dtype=torch.int32), ...})
    program.reset()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from llm_coreml.artifact.mil import Feature, Interface, Model, TensorType, fixed_shape
from llm_coreml.errors import ArtifactError, nearest
from llm_coreml.reference.program.compiler import Compiled, compile_function
from llm_coreml.reference.program.constants import ConstantPool, PackedWeight
from llm_coreml.reference.program.execution import Execution
from llm_coreml.reference.program.interface import INTERFACE_TYPES, check_input
from llm_coreml.reference.program.side_by_side import OnRows, run_side_by_side
from llm_coreml.reference.program.specialize import Specialized, analyse, specialize
from llm_coreml.reference.program.steps import Observer, Step, Values, run_all
from llm_coreml.reference.program.widened import Rows, steady, widened

# Programs for that many combinations of input shapes are kept.
_MOST_SHAPES, _MOST_NUMBERS = 32, 1 << 10


class CoreMLProgram:
    """One function of a Core ML model, with its states.

    Args:
        model: the parsed model.
        function: which of its functions; the default one if None.
        pool: its constants, and with them numerics and device; shared by a model's functions.
        compiled: compile runs of operations, see `Execution`.

    Attributes:
        inputs: what a call takes.
        outputs: what a call gives.
        states: what lives across calls, all zero at first.
        function_name: the function that a call runs.
        function_names: all functions of the model.
    """

    def __init__(
        self,
        model: Model,
        function: str | None = None,
        pool: ConstantPool | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        name = function or model.default_function
        if name not in model.functions:
            raise ArtifactError(
                f"The Core ML program has no function '{name}', "
                f"only {', '.join(sorted(model.functions))}.{nearest(name, model.functions)}"
            )
        interface = model.interfaces.get(name)
        if interface is None:
            raise ArtifactError(f"The Core ML model does not describe its function '{name}'.")
        self.function_name = name
        self.function_names = tuple(sorted(model.functions))
        self.inputs = interface.inputs
        self.outputs = interface.outputs
        self.states = interface.states
        self._model = model
        self._pool = pool or Execution().pool()
        with torch.inference_mode():
            self._compiled = compile_function(model.functions[name], self._pool)
        self._check_interface(interface)
        self._input_names = {feature.name for feature in self.inputs}
        self._known = analyse(self._compiled)
        self._specialized: dict[tuple[torch.Size, ...], Specialized] = {}
        self._fuses = compiled
        self._state_values: dict[str, torch.Tensor] = {}
        self._observe: Observer | None = None
        self.reset()

    def widened(self) -> CoreMLProgram | None:
        """Return this program with a row of its first output for every token, see `widened`.

        It has the same constants and states of its own. None where no last row is sliced out, or
        what follows takes no more rows.
        """
        wide = widened(self._model.functions[self.function_name])
        if wide is None:
            return None
        model = replace(self._model, functions={self.function_name: wide})
        try:
            return CoreMLProgram(model, self.function_name, self._pool, compiled=self._fuses)
        except ArtifactError:
            return None

    def steady(self, rows: Rows) -> CoreMLProgram:
        """Return this program, a single row computed as among so many, see `steady`.

        It has the same constants and states of its own.
        """
        pool = self._pool.with_ops(steady(self._pool.numerics.ops, rows))
        return CoreMLProgram(self._model, self.function_name, pool, compiled=self._fuses)

    def reset(self) -> None:
        """Set every state to zero."""
        for name in self._compiled.states:
            declared = self._compiled.types[name]
            shape = fixed_shape(declared, f"The state '{name}'")
            self._state_values[name] = torch.zeros(
                shape, dtype=self._pool.numerics.held(declared.dtype), device=self._pool.device
            )

    def __call__(
        self, inputs: Mapping[str, torch.Tensor] | None = None, /, **named: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Run the function once.

        Args:
            inputs: one tensor per declared input, of the declared type (fp16, fp32, int32 or int8)
                or of what `taken` says, and of an allowed shape.
            **named: inputs given by name, instead or in addition.

        Returns:
            Output name to tensor on the program's device, of the declared type; in the mode `fp32`
            what is declared fp16 comes as fp32. The caller owns the tensors, which share nothing.

        Raises:
            ArtifactError: an input is not what the model declares, or the program contradicts
                itself. States may then be half updated; `reset` makes them valid again.
        """
        compiled, given = self._compiled, {**(inputs or {}), **named}
        self._check_inputs(given)
        compiled.rounds.reset()
        shapes = tuple(given[name].shape for name in compiled.inputs)
        special = None if self._observe else self._specialized.get(shapes)
        values = self._values(special or compiled, given, self._state_values)
        with torch.inference_mode():
            if special is None:
                self._run_checked(values, shapes)
            else:
                special.run(values)
            for name, slot in compiled.states.items():
                self._state_values[name] = values[slot]
        return self._results(values)

    def _values(
        self,
        start: Compiled | Specialized,
        given: Mapping[str, torch.Tensor],
        states: Mapping[str, torch.Tensor],
    ) -> Values:
        """Return the values of a call before its first step."""
        compiled, values = self._compiled, start.initial.copy()
        for name, slot in compiled.inputs.items():
            dtype = self._pool.numerics.held(compiled.types[name].dtype)
            values[slot] = given[name].to(self._pool.device, dtype)
        for name, slot in compiled.states.items():
            values[slot] = states[name]
        return values

    def _results(self, values: Values) -> dict[str, torch.Tensor]:
        # Outside of the inference mode, so that the caller may change them.
        return {
            feature.name: values[self._compiled.outputs[feature.name]].clone()
            for feature in self.outputs
        }

    def side_by_side(
        self,
        sequences: Sequence[
            tuple[Mapping[str, torch.Tensor], Sequence[Mapping[str, torch.Tensor]]]
        ],
        on_rows: OnRows = lambda weight, rows: None,
    ) -> list[list[dict[str, torch.Tensor]]]:
        """Run sequences of calls, expanding every weight that stays packed once for all of them.

        Args:
            sequences: The states that each begins with, as `remember` takes them, none for zeros;
                and the inputs of its calls, in order.
            on_rows: Told of the rows of packed weights that are expanded for products.

        Returns:
            For each sequence what its calls gave, see `__call__`. The program's states are zero.

        Raises:
            ArtifactError: as for a call.
        """
        if not self._compiled.in_place:
            return [self._one_by_one(states, calls) for states, calls in sequences]
        begun: list[list[Values]] = []
        self._compiled.rounds.reset()
        for states, calls in sequences:
            self.reset()
            if states:
                self.remember(states)
            for given in calls:
                self._check_inputs(given)
            # All calls of a sequence hold the same tensors, which are written in place.
            begun.append([self._values(self._compiled, i, self._state_values) for i in calls])
        self.reset()
        with torch.inference_mode():
            run_side_by_side(self._compiled, [call for calls in begun for call in calls], on_rows)
        return [[self._results(values) for values in calls] for calls in begun]

    def _one_by_one(
        self, states: Mapping[str, torch.Tensor], calls: Sequence[Mapping[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        self.reset()
        if states:
            self.remember(states)
        results = [self(given) for given in calls]
        self.reset()
        return results

    def _run_checked(self, values: Values, shapes: tuple[torch.Size, ...]) -> None:
        """Run every step with all checks, and keep what the input shapes decide."""
        seen: dict[int, torch.Tensor] = {}

        def observe(step: Step, values: Values) -> None:
            for item in step.outputs:
                value = values[item.slot]
                # Sizes are a few numbers; a large table is cheaper to compute than to keep.
                if item.slot in self._known.values and value.numel() <= _MOST_NUMBERS:
                    seen[item.slot] = value
            if self._observe is not None:
                self._observe(step, values)

        run_all(self._compiled.steps, values, observe)
        if shapes in self._specialized:
            return
        if len(self._specialized) >= _MOST_SHAPES:
            self._specialized.pop(next(iter(self._specialized)))
        self._specialized[shapes] = specialize(
            self._compiled, self._known, seen, compiled=self._fuses
        )

    def constants(self) -> Iterator[tuple[str, torch.Tensor | PackedWeight]]:
        """Yield each constant tensor that an operation uses, with its name.

        Values are as the program computes with them: compressed ones are expanded, and rounded by
        the mode of execution. They are the program's own and must not be changed.
        """
        for slot, value in enumerate(self._compiled.initial):
            if value is not None:
                yield self._compiled.constants.get(slot, "a constant without a name"), value

    @contextmanager
    def observed(self, observe: Observer) -> Iterator[None]:
        """While the context lasts, have `observe(step, values)` called after each operation."""
        outer, self._observe = self._observe, observe
        try:
            yield
        finally:
            self._observe = outer

    @property
    def constant_places(self) -> frozenset[int]:
        """The places among an observer's values that hold constants."""
        return frozenset(at for at, value in enumerate(self._compiled.initial) if value is not None)

    @property
    def borders(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """The places of inputs and of outputs, by name."""
        return self._compiled.inputs, self._compiled.outputs

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return copies of all states, for `restore`."""
        return {name: value.clone() for name, value in self._state_values.items()}

    def restore(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        """Set every state to what `snapshot` returned.

        Raises:
            ArtifactError: a state is missing, unknown, or of another type or shape.
        """
        if set(snapshot) != set(self._state_values):
            raise ArtifactError(
                f"The snapshot holds the states {sorted(snapshot)}; the program has "
                f"{sorted(self._state_values)}."
            )
        for name, value in snapshot.items():
            current = self._state_values[name]
            if value.shape != current.shape or value.dtype != current.dtype:
                raise ArtifactError(
                    f"The snapshot's state '{name}' is {value.dtype}{list(value.shape)}; the "
                    f"program's is {current.dtype}{list(current.shape)}."
                )
        self._state_values = {
            name: value.to(self._pool.device, copy=True) for name, value in snapshot.items()
        }

    def remember(self, states: Mapping[str, torch.Tensor]) -> None:
        """Set every state to these numbers, as near as its type holds them.

        Raises:
            ArtifactError: see `restore`.
        """
        known = self._state_values
        self.restore(
            {
                name: value.to(known[name].dtype) if name in known else value
                for name, value in states.items()
            }
        )

    def state(self, name: str) -> torch.Tensor:
        """Return a copy of the state `name`, of its declared type (fp32 in the mode `fp32`).

        Raises:
            ArtifactError: there is no such state.
        """
        if name not in self._state_values:
            raise ArtifactError(
                f"The program has no state '{name}'.{nearest(name, self._state_values)}"
            )
        return self._state_values[name].clone()

    def taken(self, feature: Feature) -> torch.dtype:
        """Return how an input is held: as it is declared, fp16 as fp32 without rounding."""
        if feature.dtype == "fp16":
            return self._pool.numerics.held("fp16")
        return INTERFACE_TYPES[feature.dtype]

    def _check_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        for name in inputs:
            if name not in self._input_names:
                raise ArtifactError(
                    f"The program has no input '{name}'.{nearest(name, self._input_names)}"
                )
        for feature in self.inputs:
            if feature.name not in inputs:
                raise ArtifactError(f"The input '{feature.name}' is missing.")
            check_input(feature, inputs[feature.name], self.taken(feature))
        self._check_choice(inputs)

    def _check_choice(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Check that all enumerated shapes are of one choice; Core ML ties them by their place."""
        features = [feature for feature in self.inputs if feature.enumerated]
        choices = zip(*(feature.enumerated for feature in features), strict=False)
        given = tuple(tuple(inputs[feature.name].shape) for feature in features)
        if given and given not in set(choices):
            shapes = ", ".join(
                f"'{feature.name}' {list(shape)}"
                for feature, shape in zip(features, given, strict=True)
            )
            raise ArtifactError(
                f"The shapes of {shapes} are enumerated, but not together; "
                "give the inputs shapes of the same place in their lists."
            )

    def _check_interface(self, interface: Interface) -> None:
        """Check that the description and the program agree on names and element types."""
        compiled = self._compiled
        for what, features, places in (
            ("inputs", interface.inputs, compiled.inputs),
            ("outputs", interface.outputs, compiled.outputs),
            ("states", interface.states, compiled.states),
        ):
            described = {feature.name for feature in features}
            if described != set(places):
                raise ArtifactError(
                    f"The model describes the {what} {sorted(described)}; "
                    f"its program has {sorted(places)}."
                )
            for feature in features:
                declared = compiled.types[feature.name]
                if declared.dtype != feature.dtype or feature.dtype not in INTERFACE_TYPES:
                    raise ArtifactError(
                        f"The model describes '{feature.name}' as {feature.dtype}; "
                        f"its program declares {declared}."
                    )
                # The shape of an output need not be described.
                if (what != "outputs" or feature.shape) and not _agrees(feature, declared):
                    raise ArtifactError(
                        f"The model describes '{feature.name}' with shape {list(feature.shape)}; "
                        f"its program declares {declared}."
                    )


def _agrees(feature: Feature, declared: TensorType) -> bool:
    """Return whether the described shapes are among those that the program declares."""
    return all(
        len(shape) == len(declared.shape)
        and all(size in (None, given) for size, given in zip(declared.shape, shape, strict=True))
        for shape in (feature.shape, *feature.enumerated)
    )
