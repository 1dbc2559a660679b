"""Run any Core ML program by names: of a .pte or a .mlpackage, or a method of a .pte.

runnable = open_runnable(Path("model.mlpackage"), function=None, method=None, execution=Execution())
outputs = runnable.run({"x": torch.zeros(1, 4)})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_coreml.artifact.method_plan import TensorSpec
from llm_coreml.artifact.mil import Feature
from llm_coreml.errors import ArtifactError, ConfigError, nearest
from llm_coreml.reference import load, load_method
from llm_coreml.reference.method.memory import dtype_of
from llm_coreml.reference.method.method import LoadedMethod
from llm_coreml.reference.program.coreml_program import CoreMLProgram
from llm_coreml.reference.program.execution import Execution
from llm_coreml.reference.program.interface import INTERFACE_TYPES

# The lowest and the highest size of each dimension; None is no limit.
_Sizes = tuple[tuple[int, int | None], ...]
Named = Mapping[str, torch.Tensor]
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


@dataclass(frozen=True)
class Port:
    """An input, output or state.

    Attributes:
        name: what it is called.
        dtype: torch's element type.
        shapes: the allowed shapes; empty where the file does not tell.
    """

    name: str
    dtype: torch.dtype
    shapes: tuple[_Sizes, ...]

    def __str__(self) -> str:
        shapes = " or ".join(
            f"[{', '.join(_size(low, high) for low, high in sizes)}]" for sizes in self.shapes
        )
        return f"{_name(self.dtype)} {shapes}".rstrip()

    def accept(self, value: torch.Tensor) -> torch.Tensor:
        """Return `value` as the port takes it: integers of another width if every one fits.

        Raises:
            ConfigError: the element type or the shape is another.
        """
        fits = value.dtype == self.dtype
        if not fits and {self.dtype, value.dtype} <= _INTEGERS:
            limits, wide = torch.iinfo(self.dtype), value.to(torch.int64)
            fits = bool(((wide >= limits.min) & (wide <= limits.max)).all())
            value = value.to(self.dtype) if fits else value
        if not fits or not any(_within(tuple(value.shape), sizes) for sizes in self.shapes):
            raise ConfigError(
                f"The input '{self.name}' is {_name(value.dtype)} {list(value.shape)}; the program "
                f"takes {self}."
            )
        return value


@dataclass(frozen=True, eq=False)
class Runnable:
    """What can be run by names.

    Attributes:
        inputs: what a call takes.
        outputs: what a call gives.
        states: what lives across calls.
        call: runs it once, without a look at names and types.
        program: the Core ML program whose states can be saved; None for a whole method.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[Port, ...]
    call: Callable[[Named], dict[str, torch.Tensor]]
    program: CoreMLProgram | None

    def run(self, given: Named) -> dict[str, torch.Tensor]:
        """Run once and return the outputs by name.

        Raises:
            ConfigError: a name is missing or unknown, or a tensor is not what the program takes.
            ArtifactError: the program fails.
        """
        names = [port.name for port in self.inputs]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ConfigError(
                f"The program has no input '{unknown[0]}', only {_listed(names)}."
                f"{nearest(unknown[0], names)}"
            )
        missing = [port for port in self.inputs if port.name not in given]
        if missing:
            raise ConfigError(f"The input '{missing[0].name}' is missing; give {missing[0]}.")
        return self.call({port.name: port.accept(given[port.name]) for port in self.inputs})

    def interface(self) -> dict[str, dict[str, str]]:
        """Return the type and the shapes of inputs, outputs and states, for people."""
        return {
            kind: {port.name: str(port) for port in ports}
            for kind, ports in (
                ("inputs", self.inputs),
                ("outputs", self.outputs),
                ("states", self.states),
            )
        }

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return the states, see `CoreMLProgram.snapshot`; none of a whole method."""
        return {} if self.program is None else self.program.snapshot()

    def restore(self, states: Named) -> None:
        """Begin with `states` that `snapshot` returned.

        Raises:
            ConfigError: they are not this program's.
        """
        if self.program is not None:
            try:
                self.program.restore(states)
            except ArtifactError as error:
                raise ConfigError(str(error)) from None


def describe(value: torch.Tensor) -> dict[str, Any]:
    """Return element type, shape, and the lowest and highest number; None if one is not finite."""
    wide = value.to(torch.float64)
    low, high = (
        (float(item) for item in torch.aminmax(wide)) if wide.numel() else (math.nan, math.nan)
    )
    finite = math.isfinite(low) and math.isfinite(high)
    return {
        "dtype": _name(value.dtype),
        "shape": list(value.shape),
        "lowest": low if finite else None,
        "highest": high if finite else None,
    }


def open_runnable(
    path: Path, *, function: str | None, method: str | None, execution: Execution
) -> Runnable:
    """Load what is at `path`.

    Args:
        path: a `.pte` or a `.mlpackage`.
        function: function of the Core ML program; its default one if None.
        method: method of a `.pte` to run as a whole, its kernels included; None runs the Core ML
            program alone.
        execution: numerics, device and memory.

    Raises:
        ArtifactError: it is damaged, has no such function or method, or cannot be run.
        ConfigError: both a function and a method, or a method of a `.mlpackage`, are asked for.
    """
    if method is None:
        return _of_program(load(path, function, execution))
    if function is not None:
        raise ConfigError(
            "--function names a part of the Core ML program and --method one of the .pte around "
            "it; give one of them."
        )
    if path.is_dir():
        raise ConfigError(f"'{path}' is a .mlpackage, which has no methods; give --function.")
    return _of_method(load_method(path, method, execution))


def _of_program(program: CoreMLProgram) -> Runnable:
    return Runnable(
        tuple(map(_of_feature, program.inputs)),
        tuple(map(_of_feature, program.outputs)),
        tuple(map(_of_feature, program.states)),
        program,
        program,
    )


def _of_method(loaded: LoadedMethod) -> Runnable:
    # A method's arguments have places, no names.
    inputs = tuple(_of_spec(f"input_{at}", spec) for at, spec in enumerate(loaded.inputs))
    outputs = tuple(_of_spec(f"output_{at}", spec) for at, spec in enumerate(loaded.outputs))

    def call(given: Named) -> dict[str, torch.Tensor]:
        results = loaded.run(*(given[port.name] for port in inputs))
        return {port.name: result for port, result in zip(outputs, results, strict=True)}

    return Runnable(inputs, outputs, (), call, None)


def _of_feature(feature: Feature) -> Port:
    shapes: tuple[_Sizes, ...]
    if feature.ranges and not feature.enumerated:
        shapes = (feature.ranges,)
    else:
        listed = feature.enumerated or ((feature.shape,) if feature.shape else ())
        shapes = tuple(tuple((size, size) for size in shape) for shape in listed)
    return Port(feature.name, INTERFACE_TYPES[feature.dtype], shapes)


def _of_spec(name: str, spec: TensorSpec) -> Port:
    sizes = tuple((0 if spec.dynamic else size, size) for size in spec.shape)
    return Port(name, dtype_of(spec), (sizes,))


def _within(shape: tuple[int, ...], sizes: _Sizes) -> bool:
    return len(shape) == len(sizes) and all(
        low <= size and (high is None or size <= high)
        for size, (low, high) in zip(shape, sizes, strict=True)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(low: int, high: int | None) -> str:
    return str(low) if low == high else f"{low}..{'' if high is None else high}"


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none at all"
