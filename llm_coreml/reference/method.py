"""Run a whole method of a `.pte`: its casts and its Core ML delegates, in the plan's own order.

    forward = load_method("model.pte")
    logits = forward(torch.tensor([[1, 2, 3]]), torch.tensor([0]))
    forward.reset()

Nothing is assumed about the plan. Each instruction is executed as it stands; one that is neither a
Core ML delegate nor a cast is an error that names it, when the method is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from llm_coreml.errors import ArtifactError, nearest
from llm_coreml.reference import pte
from llm_coreml.reference.packages import load_delegate
from llm_coreml.reference.pte import Instruction, Method, TensorSpec
from llm_coreml.reference.runtime import CoreMLProgram

# Kernels that convert the element type; the result's type is that of the plan's output tensor.
_CASTS = frozenset({"aten::_to_copy.out", "dim_order_ops::_to_dim_order_copy.out"})

Values = list[torch.Tensor | None]


class LoadedMethod:
    """A method of a `.pte`, ready to run.

    Attributes:
        name: the method's name.
        inputs: dtype and shape of each argument.
        outputs: dtype and shape of each result.
        programs: the Core ML programs, by delegate.
        constants: what the file's constant methods give, such as `get_max_seq_len`.
    """

    def __init__(self, method: Method, constants: dict[str, pte.Constant]) -> None:
        self.name = method.name
        self.constants = constants
        self.inputs = tuple(_tensor_spec(method, number) for number in method.inputs)
        self.outputs = tuple(_tensor_spec(method, number) for number in method.outputs)
        self.programs: list[CoreMLProgram] = []
        self._method = method
        loaded = [load_delegate(delegate) for delegate in method.delegates]
        self.programs = [program for program, _, _ in loaded]
        self._steps = [
            self._delegate(instruction, *loaded[int(instruction.target)])
            if instruction.kind == "delegate"
            else self._cast(instruction)
            for instruction in method.instructions
        ]

    def reset(self) -> None:
        """Set the states of all programs to zero."""
        for program in self.programs:
            program.reset()

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        """Run the method and return its only output.

        Args:
            *arguments: as `inputs` says; for a language model `tokens` int64 [1, S] and
                `start_pos` int64 [1].

        Returns:
            The method's output, for a language model float32 [1, 1, V] or [1, S, V].

        Raises:
            ArtifactError: the method has several outputs, or as `run` says.
        """
        results = self.run(*arguments)
        if len(results) != 1:
            raise ArtifactError(f"Method '{self.name}' gives {len(results)} outputs; use run().")
        return results[0]

    def run(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the method and return all its outputs.

        Raises:
            ArtifactError: an argument does not fit, or the program contradicts itself.
        """
        if len(arguments) != len(self.inputs):
            raise ArtifactError(
                f"Method '{self.name}' takes {len(self.inputs)} arguments, not {len(arguments)}."
            )
        values: Values = [None] * len(self._method.values)
        for number, spec, value in zip(self._method.inputs, self.inputs, arguments, strict=True):
            _check(spec, value, f"Argument {number} of method '{self.name}'")
            values[number] = value
        for step in self._steps:
            step(values)
        return tuple(_present(values, number, self.name) for number in self._method.outputs)

    def _cast(self, instruction: Instruction) -> Callable[[Values], None]:
        if instruction.kind != "kernel" or instruction.target not in _CASTS:
            what = instruction.target or instruction.kind
            raise ArtifactError(
                f"Method '{self.name}' runs '{what}' outside of Core ML; the reference runs only "
                f"{' and '.join(sorted(_CASTS))} there."
            )
        source, result = instruction.args[0], instruction.args[-1]
        expected = _tensor_spec(self._method, result)

        def step(values: Values) -> None:
            value = _convert(_present(values, source, self.name), expected, instruction.target)
            _check(expected, value, f"The result of {instruction.target}")
            values[result] = value

        return step

    def _delegate(
        self,
        instruction: Instruction,
        program: CoreMLProgram,
        input_names: tuple[str, ...],
        output_names: tuple[str, ...],
    ) -> Callable[[Values], None]:
        args = instruction.args
        if len(args) != len(input_names) + len(output_names):
            raise ArtifactError(
                f"Method '{self.name}' passes {len(args)} values to a delegate; its metadata names "
                f"{len(input_names)} inputs and {len(output_names)} outputs."
            )
        features = {feature.name: feature for feature in program.inputs}
        if set(input_names) != set(features) or not set(output_names) <= {
            feature.name for feature in program.outputs
        }:
            raise ArtifactError(
                f"The metadata of a delegate of method '{self.name}' names inputs or outputs that "
                "its program does not have."
            )
        sources = dict(zip(input_names, args, strict=False))
        results = dict(zip(output_names, args[len(input_names) :], strict=True))
        expected = {name: _tensor_spec(self._method, number) for name, number in results.items()}

        def step(values: Values) -> None:
            given = {name: _present(values, number, self.name) for name, number in sources.items()}
            outputs = program(given)
            for name, number in results.items():
                # ExecuTorch's delegate converts to the plan's type when it copies a result out.
                value = _convert(outputs[name], expected[name], f"output '{name}'")
                _check(expected[name], value, f"The output '{name}'")
                values[number] = value

        return step


def load_method(path: str | Path, name: str = "forward") -> LoadedMethod:
    """Load the method `name` of the `.pte` at `path`.

    Raises:
        ArtifactError: the file is damaged, has no such method, or the method does what the
            reference cannot run.
    """
    container = pte.read(path)
    if name not in container.methods:
        raise ArtifactError(
            f"'{path}' has no method '{name}', only {', '.join(sorted(container.methods))}."
            f"{nearest(name, container.methods)}"
        )
    method = container.methods[name]
    if not method.delegates:
        raise ArtifactError(f"Method '{name}' of '{path}' has no delegate.")
    return LoadedMethod(method, pte.constants_of(container))


def _tensor_spec(method: Method, number: int) -> TensorSpec:
    value = method.values[number]
    if not isinstance(value, TensorSpec):
        raise ArtifactError(
            f"Method '{method.name}' passes a {type(value).__name__}, not a tensor."
        )
    return value


def _present(values: Values, number: int, method: str) -> torch.Tensor:
    value = values[number]
    if value is None:
        raise ArtifactError(f"Method '{method}' uses value {number} before it exists.")
    return value


def _dtype(spec: TensorSpec) -> torch.dtype:
    found = getattr(torch, spec.dtype, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"The plan uses the element type '{spec.dtype}', which is unknown.")
    return found


def _convert(value: torch.Tensor, spec: TensorSpec, who: str) -> torch.Tensor:
    """Return `value` in the type of `spec`.

    Raises:
        ArtifactError: an integer does not fit, or a float would become an integer.
    """
    target = _dtype(spec)
    if value.dtype == target:
        return value
    if not target.is_floating_point and value.is_floating_point():
        raise ArtifactError(f"{who} would convert {value.dtype} to {target} and lose fractions.")
    if not target.is_floating_point and value.numel():
        limit = torch.iinfo(target)
        low, high = (int(bound) for bound in torch.aminmax(value))
        if low < limit.min or high > limit.max:
            raise ArtifactError(
                f"{who} converts values {low} to {high}, which {target} cannot hold."
            )
    return value.to(target)


def _check(spec: TensorSpec, value: torch.Tensor, who: str) -> None:
    if value.dtype != _dtype(spec):
        raise ArtifactError(f"{who} is {value.dtype}; the plan says {spec.dtype}.")
    shape = tuple(value.shape)
    fits = (
        len(shape) == len(spec.shape)
        and all(size <= bound for size, bound in zip(shape, spec.shape, strict=True))
        if spec.dynamic
        else shape == spec.shape
    )
    if not fits:
        bound = "at most " if spec.dynamic else ""
        raise ArtifactError(
            f"{who} has shape {list(shape)}; the plan says {bound}{list(spec.shape)}."
        )
