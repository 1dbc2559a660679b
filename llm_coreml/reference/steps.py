"""One compiled operation: what to call, where its operands lie, and what its result must be.

Values live in a list; a step knows its operands and results by their place in it. Running a program
is one pass over the steps, with no look at the model file and no dictionary of names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.dtypes import storage
from llm_coreml.reference.mil import TensorType

# What an operation raises whose operands a damaged program chose.
FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

Values = list[Any]
Place = int | tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """A result's place and what the program declares about it.

    Attributes:
        slot: its place among the values.
        declared: the declared type.
        dtype: the torch type that holds it.
        rounds: whether its values must be rounded to fp16.
        shape: the declared shape where every size is known.
        fixed: axis and size of the known sizes where some are unknown.
    """

    slot: int
    declared: TensorType
    dtype: torch.dtype
    rounds: bool
    shape: torch.Size | None
    fixed: tuple[tuple[int, int], ...]

    def admits(self, value: object) -> bool:
        """Return whether `value` has the declared type."""
        if not isinstance(value, torch.Tensor) or value.dtype != self.dtype:
            return False
        if self.shape is not None:
            return value.shape == self.shape
        sizes = value.shape
        return len(sizes) == len(self.declared.shape) and all(
            sizes[axis] == size for axis, size in self.fixed
        )


def output(slot: int, declared: TensorType, exact: bool) -> Output:
    """Return the output at `slot`; `exact` results need no rounding."""
    sizes = declared.shape
    known = tuple((axis, size) for axis, size in enumerate(sizes) if size is not None)
    return Output(
        slot,
        declared,
        storage(declared.dtype),
        declared.dtype == "fp16" and not exact,
        torch.Size([size for _, size in known]) if len(known) == len(sizes) else None,
        known,
    )


def round_to_half(value: torch.Tensor) -> torch.Tensor:
    """Return the fp32 tensor with every value rounded to what fp16 holds; too large ones to inf."""
    return value.to(torch.float16).to(torch.float32)


@dataclass(frozen=True, eq=False)
class Step:
    """One operation, ready to run.

    Attributes:
        label: name and type, for errors.
        call: computes the results from the values.
        outputs: what it must give.
        frees: places whose value nobody needs afterwards.
    """

    label: str
    call: Callable[[Values], Any]
    outputs: tuple[Output, ...]
    frees: tuple[int, ...]

    def run(self, values: Values) -> None:
        """Compute, check, round and store the results.

        Raises:
            ArtifactError: the operation fails, or its result is not what the program declares.
        """
        try:
            result = self.call(values)
        except ArtifactError as error:
            raise ArtifactError(f"{self.label} {error}.") from error
        except FAILURES as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ArtifactError(f"{self.label} fails: {reason}") from error
        results = result if isinstance(result, (tuple, list)) else (result,)
        if len(results) != len(self.outputs):
            raise ArtifactError(
                f"{self.label} gives {len(results)} results; "
                f"the program declares {len(self.outputs)}."
            )
        for value, expected in zip(results, self.outputs, strict=True):
            if not expected.admits(value):
                raise ArtifactError(f"{self.label} {_difference(value, expected)}")
            values[expected.slot] = round_to_half(value) if expected.rounds else value
        for slot in self.frees:
            values[slot] = None


def _difference(value: object, expected: Output) -> str:
    if not isinstance(value, torch.Tensor):
        return f"gives a {type(value).__name__}; the program declares {expected.declared}."
    kind = str(value.dtype).removeprefix("torch.")
    return (
        f"gives {kind}{list(value.shape)}; the program declares {expected.declared}. "
        "The program lies about its types, and a device may compute something else."
    )


def bind(
    function: Callable[..., Any], places: Mapping[str, Place], constants: Mapping[str, Any]
) -> Callable[[Values], Any]:
    """Return `function` as one of the values, its constants already given.

    Args:
        function: takes keyword arguments only.
        places: argument name to place, or to several places for a list.
        constants: argument name to value.
    """
    fixed = dict(constants)
    single = [(name, place) for name, place in places.items() if isinstance(place, int)]
    several = [(name, place) for name, place in places.items() if isinstance(place, tuple)]

    def call(values: Values) -> Any:
        return function(**{name: values[place] for name, place in single}, **fixed)

    def call_with_lists(values: Values) -> Any:
        return function(
            **{name: values[place] for name, place in single},
            **{name: [values[at] for at in place] for name, place in several},
            **fixed,
        )

    return call_with_lists if several else call


def copy_of(slot: int) -> Callable[[Values], Any]:
    """Return a step's call that gives the value at `slot` itself."""
    return lambda values: values[slot]


def clone_of(slot: int) -> Callable[[Values], Any]:
    """Return a step's call that gives a copy of the value at `slot`."""
    return lambda values: values[slot].clone()


def run_all(steps: Sequence[Step], values: Values) -> None:
    """Run the steps in order over `values`."""
    for step in steps:
        step.run(values)
