"""Run one function of a Core ML model on any machine.

Values that the program declares fp16 are rounded to fp16 after each operation and computed in fp32
in between; fp32 stays fp32; integers and bools are exact. After each operation the result's element
type, rank and known sizes must be what the program declares.

    program = load("model.pte")
    outputs = program({"tokens": torch.zeros(1, 8, dtype=torch.int32), ...})
    program.reset()
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llm_coreml.errors import ArtifactError, nearest
from llm_coreml.reference.compiler import compile_function
from llm_coreml.reference.mil import Feature, Interface, Model
from llm_coreml.reference.steps import run_all

INTERFACE_TYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int8": torch.int8,
}


class CoreMLProgram:
    """One function of a Core ML model, with its states.

    Attributes:
        inputs: what a call takes.
        outputs: what a call gives.
        states: what lives across calls, all zero at first.
        function_name: the function that a call runs.
        function_names: all functions of the model.
    """

    def __init__(self, model: Model, function: str | None = None) -> None:
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
        with torch.inference_mode():
            self._compiled = compile_function(model.functions[name])
        self._check_interface(interface)
        self._input_names = {feature.name for feature in self.inputs}
        self._state_values: dict[str, torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Set every state to zero."""
        for name in self._compiled.states:
            declared = self._compiled.types[name]
            shape = [size for size in declared.shape if size is not None]
            if len(shape) != len(declared.shape):
                raise ArtifactError(f"The state '{name}' has the type {declared}, of unknown size.")
            self._state_values[name] = torch.zeros(shape)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the function once.

        Args:
            inputs: one tensor per declared input, of the declared type (fp16, fp32, int32 or int8)
                and of an allowed shape.

        Returns:
            Output name to tensor, of the declared type. The caller owns the tensors.

        Raises:
            ArtifactError: an input is not what the model declares, or the program contradicts
                itself. States may then be half updated; `reset` makes them valid again.
        """
        self._check_inputs(inputs)
        compiled = self._compiled
        values = compiled.initial.copy()
        for name, slot in compiled.inputs.items():
            value = inputs[name]
            values[slot] = value.to(torch.float32) if value.dtype == torch.float16 else value
        for name, slot in compiled.states.items():
            values[slot] = self._state_values[name]
        with torch.inference_mode():
            run_all(compiled.steps, values)
            for name, slot in compiled.states.items():
                self._state_values[name] = values[slot]
            return {
                feature.name: self._output(feature, values[compiled.outputs[feature.name]])
                for feature in self.outputs
            }

    def state(self, name: str) -> torch.Tensor:
        """Return a copy of the state `name`, in fp32 (whose values fp16 can hold).

        Raises:
            ArtifactError: there is no such state.
        """
        if name not in self._state_values:
            raise ArtifactError(
                f"The program has no state '{name}'.{nearest(name, self._state_values)}"
            )
        return self._state_values[name].clone()

    def _output(self, feature: Feature, value: torch.Tensor) -> torch.Tensor:
        if feature.dtype == "fp16":
            return value.to(torch.float16)
        return value.clone() if feature.name in self._compiled.shared_outputs else value

    def _check_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        for name in inputs:
            if name not in self._input_names:
                raise ArtifactError(
                    f"The program has no input '{name}'.{nearest(name, self._input_names)}"
                )
        for feature in self.inputs:
            if feature.name not in inputs:
                raise ArtifactError(f"The input '{feature.name}' is missing.")
            _check_input(feature, inputs[feature.name])
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
                if what != "outputs" and len(declared.shape) != len(feature.shape):
                    raise ArtifactError(
                        f"The model describes '{feature.name}' with shape {list(feature.shape)}; "
                        f"its program declares {declared}."
                    )


def _check_input(feature: Feature, value: torch.Tensor) -> None:
    name, shape = feature.name, tuple(value.shape)
    wanted = INTERFACE_TYPES[feature.dtype]
    if value.dtype != wanted:
        raise ArtifactError(f"The input '{name}' is {value.dtype}; the model takes {wanted}.")
    if feature.enumerated:
        if shape not in feature.enumerated:
            allowed = ", ".join(str(list(item)) for item in feature.enumerated)
            raise ArtifactError(
                f"The input '{name}' has shape {list(shape)}, which is not enumerated; "
                f"allowed are {allowed}."
            )
    elif feature.ranges:
        fits = len(shape) == len(feature.ranges) and all(
            low <= size and (high is None or size <= high)
            for size, (low, high) in zip(shape, feature.ranges, strict=True)
        )
        if not fits:
            limits = ", ".join(
                f"{low}..{'' if high is None else high}" for low, high in feature.ranges
            )
            raise ArtifactError(
                f"The input '{name}' has shape {list(shape)}; allowed is [{limits}]."
            )
    elif shape != feature.shape:
        raise ArtifactError(
            f"The input '{name}' has shape {list(shape)}; the model takes {list(feature.shape)}."
        )
