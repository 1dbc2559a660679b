"""The memory of a plan: tensors as places in a few arenas, laid out when the file was written.

The exporter decides which tensors share memory: a view of another tensor has its place and is
computed by no instruction, and a buffer that lives across calls has a place that nothing else uses.
So the layout is followed, not second-guessed.

    memory = MethodMemory(method)
    values = memory.values()
    memory.store(values, number, result, "aten::add.out")
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llm_coreml.artifact.limits import beyond
from llm_coreml.artifact.method_plan import Method, Place, TensorSpec
from llm_coreml.errors import ArtifactError

Values = list[Any]


class MethodMemory:
    """The arenas of one method, zero at first except where the file holds initial data.

    Raises:
        ArtifactError: a tensor's type, layout or data is not what the reference can hold.
    """

    def __init__(self, method: Method) -> None:
        self._method = method.name
        self._specs = {
            number: value
            for number, value in enumerate(method.values)
            if isinstance(value, TensorSpec)
        }
        for number, spec in self._specs.items():
            _check_spec(spec, f"Value {number} of method '{method.name}'")
        # Negative sizes are possible in a damaged file; no tensor can lie in such an arena.
        sizes = [max(0, size) for size in method.arenas]
        constants = sum(spec.nbytes or 0 for spec in self._specs.values() if spec.constant)
        if excess := beyond(sum(sizes) + constants):
            raise ArtifactError(f"Method '{method.name}' with its tensors {excess}.")
        self._arenas = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        self._initial: Values = [
            self._first(value) if isinstance(value, TensorSpec) else value
            for value in method.values
        ]
        self.reset()

    def reset(self) -> None:
        """Set the arenas to zero, and tensors with initial data to that data."""
        for arena in self._arenas:
            arena.zero_()
        for number, spec in self._specs.items():
            if spec.place is not None and spec.data is not None:
                self._initial[number].copy_(_loaded(spec))

    def values(self) -> Values:
        """Return what each value of the plan is before the first instruction."""
        return self._initial.copy()

    def check(
        self, number: int, dtype: torch.dtype, shape: tuple[int, ...], who: str
    ) -> TensorSpec:
        """Check that value `number` may become a tensor of `dtype` and `shape`, and say what it is.

        Raises:
            ArtifactError: the plan says otherwise.
        """
        spec = self._specs.get(number)
        if spec is None:
            raise ArtifactError(f"{who} is a tensor; the plan says {self._initial[number]!r}.")
        check_tensor(spec, dtype, shape, who)
        return spec

    def store(self, values: Values, number: int, value: torch.Tensor, who: str) -> None:
        """Put a result where the plan wants it.

        Raises:
            ArtifactError: it has not the type or shape that the plan says.
        """
        spec = self.check(number, value.dtype, tuple(value.shape), who)
        if spec.place is None:
            values[number] = value
            return
        values[number] = self._at(spec, spec.place, tuple(value.shape)).copy_(value)

    def _first(self, spec: TensorSpec) -> torch.Tensor | None:
        if spec.place is not None:
            return self._at(spec, spec.place, spec.shape)
        return _loaded(spec) if spec.data is not None else None

    def _at(self, spec: TensorSpec, place: Place, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = dtype_of(spec)
        if place.offset % dtype.itemsize:
            raise ArtifactError(
                f"A tensor of {spec.dtype} lies at byte {place.offset}; that is not aligned."
            )
        count = torch.Size(shape).numel() * dtype.itemsize
        return self._arenas[place.arena][place.offset :][:count].view(dtype).view(shape)


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """Return torch's element type of `spec`.

    Raises:
        ArtifactError: it has none.
    """
    found = getattr(torch, spec.dtype, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"The plan uses the element type '{spec.dtype}', which is unknown.")
    return found


def check_tensor(spec: TensorSpec, dtype: torch.dtype, shape: tuple[int, ...], who: str) -> None:
    """Check that a tensor of `dtype` and `shape` is what `spec` says.

    Raises:
        ArtifactError: it is not; `who` is the subject of the sentence.
    """
    if dtype != dtype_of(spec):
        raise ArtifactError(f"{who} is {dtype}; the plan says {spec.dtype}.")
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


def _check_spec(spec: TensorSpec, who: str) -> None:
    dtype_of(spec)
    if spec.external:
        raise ArtifactError(
            f"{who} takes its data '{spec.external}' from a .ptd file, which is not supported; "
            "export the model into one file."
        )
    if spec.dim_order and spec.dim_order != tuple(range(len(spec.shape))):
        raise ArtifactError(
            f"{who} has the dimension order {list(spec.dim_order)}; only contiguous tensors are "
            "supported."
        )


def _loaded(spec: TensorSpec) -> torch.Tensor:
    """Return a copy of the data of `spec`; the file itself is mapped and must not be written to."""
    data = torch.from_numpy(np.frombuffer(spec.data or b"", np.uint8).copy())
    return data.view(dtype_of(spec)).view(spec.shape)
