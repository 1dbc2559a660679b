"""One compiled operation: what to call, where its operands lie, and what its result must be.

Values live in a list; a step knows its operands and results by their place in it. Running a program
is one pass over the steps, with no look at the model file and no dictionary of names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm_coreml.artifact.limits import FAILURES, reason
from llm_coreml.artifact.mil import TensorType
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.program.numerics import Numerics

Values = list[Any]
Place = int | tuple[int, ...]
Compute = Callable[[Values], Any]


@dataclass(frozen=True)
class Output:
    """A result's place and what the program declares about it.

    Attributes:
        name: the value's name in the program.
        slot: its place among the values.
        declared: the declared type.
        dtype: the torch type that holds it.
        shape: the declared shape where every size is known.
        fixed: axis and size of the known sizes where some are unknown.
    """

    name: str
    slot: int
    declared: TensorType
    dtype: torch.dtype
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

    def rounded(self, value: Any) -> Any:
        """Return `value`, computed in fp32, as the fp16 that it is declared to be."""
        if self.dtype is torch.float16 and value.dtype is torch.float32:
            return value.to(torch.float16)
        return value


def output(name: str, slot: int, declared: TensorType, numerics: Numerics) -> Output:
    """Return the output `name` at `slot`."""
    sizes = declared.shape
    known = tuple((axis, size) for axis, size in enumerate(sizes) if size is not None)
    shape = torch.Size([size for _, size in known]) if len(known) == len(sizes) else None
    return Output(name, slot, declared, numerics.held(declared.dtype), shape, known)


@dataclass(frozen=True, eq=False)
class Call:
    """A function and what it is given.

    Attributes:
        function: takes keyword arguments only.
        places: parameter to place, or to several places for a list.
        fixed: parameter to value.
        widened: parameters whose fp16 tensors the function gets as fp32.
        dynamic: parameters that the function takes as Python numbers, too.
        sizes_from_data: whether the values, not only the shapes, of tensors decide the results'
            shapes.
    """

    function: Callable[..., Any]
    places: Mapping[str, Place]
    fixed: Mapping[str, Any]
    widened: frozenset[str] = frozenset()
    dynamic: frozenset[str] = frozenset()
    sizes_from_data: bool = False

    def arguments(self, values: Values) -> dict[str, Any]:
        """Return what the function is given, of operands that are no lists."""
        given = dict(self.fixed)
        for name, place in self.places.items():
            assert isinstance(place, int), "a list of operands"
            wide = name in self.widened
            given[name] = values[place].to(torch.float32) if wide else values[place]
        return given

    def bind(self) -> Compute:
        """Return the call as a function of the values."""
        function, fixed = self.function, dict(self.fixed)
        plain = [
            (name, place)
            for name, place in self.places.items()
            if isinstance(place, int) and name not in self.widened
        ]
        if len(plain) == len(self.places):
            return lambda values: function(**{name: values[at] for name, at in plain}, **fixed)
        wide = [
            (name, place)
            for name, place in self.places.items()
            if isinstance(place, int) and name in self.widened
        ]
        lists = [(name, place) for name, place in self.places.items() if isinstance(place, tuple)]
        if not lists:
            return lambda values: function(
                **{name: values[at] for name, at in plain},
                **{name: values[at].to(torch.float32) for name, at in wide},
                **fixed,
            )
        widened = self.widened

        def with_lists(values: Values) -> Any:
            given = {name: [values[at] for at in places] for name, places in lists}
            for name in widened & given.keys():
                given[name] = [value.to(torch.float32) for value in given[name]]
            return function(
                **given,
                **{name: values[at] for name, at in plain},
                **{name: values[at].to(torch.float32) for name, at in wide},
                **fixed,
            )

        return with_lists


@dataclass(frozen=True, eq=False)
class Step:
    """One operation, ready to run.

    Attributes:
        label: name and type, for errors.
        type: the operation's type.
        call: what computes it; its places are the operation's operands.
        compute: computes the results from the values.
        outputs: what it must give.
        frees: places whose value nobody needs afterwards.
    """

    label: str
    type: str
    call: Call
    compute: Compute
    outputs: tuple[Output, ...]
    frees: tuple[int, ...]

    def run(self, values: Values) -> None:
        """Compute, check, round and store the results.

        Raises:
            ArtifactError: the operation fails, or its result is not what the program declares.
        """
        self.keep(values, self.guarded(values))

    def keep(self, values: Values, result: Any) -> None:
        """Check, round and store what the operation gave.

        Raises:
            ArtifactError: it is not what the program declares.
        """
        results = result if isinstance(result, (tuple, list)) else (result,)
        if len(results) != len(self.outputs):
            raise ArtifactError(
                f"{self.label} gives {len(results)} results; "
                f"the program declares {len(self.outputs)}."
            )
        for item, expected in zip(results, self.outputs, strict=True):
            value = expected.rounded(item) if isinstance(item, torch.Tensor) else item
            if not expected.admits(value):
                raise ArtifactError(f"{self.label} {_difference(value, expected)}")
            values[expected.slot] = value

    def guarded(self, values: Values) -> Any:
        """Compute the results, neither checked nor rounded nor stored.

        Raises:
            ArtifactError: the operation fails.
        """
        try:
            return self.compute(values)
        except ArtifactError as error:
            raise ArtifactError(f"{self.label} {error}.") from error
        except FAILURES as error:
            raise ArtifactError(f"{self.label} fails: {reason(error)}") from error

    def operands(self) -> tuple[int, ...]:
        """Return the places that the operation reads."""
        found: list[int] = []
        for place in self.call.places.values():
            found += [place] if isinstance(place, int) else place
        return tuple(found)


def _difference(value: object, expected: Output) -> str:
    if not isinstance(value, torch.Tensor):
        return f"gives a {type(value).__name__}; the program declares {expected.declared}."
    kind = str(value.dtype).removeprefix("torch.")
    return (
        f"gives {kind}{list(value.shape)}; the program declares {expected.declared}. "
        "The program lies about its types, and a device may compute something else."
    )


Observer = Callable[[Step, Values], None]


def run_all(steps: Sequence[Step], values: Values, observe: Observer | None = None) -> None:
    """Run the steps in order over `values`.

    Args:
        steps: what to run.
        values: one per place; changed.
        observe: called after each step, while its operands still exist.
    """
    for step in steps:
        step.run(values)
        if observe is not None:
            observe(step, values)
        for slot in step.frees:
            values[slot] = None
