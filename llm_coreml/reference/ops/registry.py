"""The table of operations: MIL's name to a torch function, with what the compiler must know.

    @op("add", same("x", "y"))
    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

Parameters carry MIL's names. Their annotations say how the compiler passes them: `Tensor` as a
tensor, `Sequence[Tensor]` as a list with one tensor per binding, `Ints` and `Number` as Python
values where the program has constants and as tensors otherwise, anything else as Python values that
must be constants (`Sequence[int]` with one per binding). A parameter named `declared` receives the
declared element type of the first output, one named `device` the device that the program runs on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from llm_coreml.artifact.compatibility import MIXED_ADVICE
from llm_coreml.errors import ArtifactError

Tensor = torch.Tensor
Ints = Sequence[int] | torch.Tensor
Number = float | torch.Tensor
Rule = Callable[[Mapping[str, str], Mapping[str, Any]], str | tuple[str, ...]]
Kernel = Callable[..., Any]
Decorated = TypeVar("Decorated", bound=Kernel)


@dataclass(frozen=True)
class Spec:
    """What the compiler knows about one operation.

    Attributes:
        function: the torch implementation.
        parameters: every parameter's name and kind: tensor, tensors, dynamic, plain or plains.
        required: the parameters without a default.
        supplied: the parameters that the compiler gives: `declared`, `device`.
        result: gives the element type of each output from those of the inputs.
        exact: the values are copied or chosen, so rounding them to fp16 again is idle.
        fresh: the result never shares memory with an input.
        half: torch's fp16 kernel gives what computing in fp32 and rounding once gives, so fp16
            operands need not be widened.
        rows: of a compressed constant, the parameters whose first axis runs along the result's.
    """

    function: Kernel
    parameters: Mapping[str, str]
    required: frozenset[str]
    supplied: frozenset[str]
    result: Rule
    exact: bool
    fresh: bool
    half: bool
    rows: tuple[str, ...]


OPS: dict[str, Spec] = {}

_SUPPLIED = frozenset({"declared", "device"})
_KINDS = {
    "Tensor": "tensor",
    "Tensor | None": "tensor",
    "Sequence[Tensor]": "tensors",
    "Ints": "dynamic",
    "Number": "dynamic",
}


def op(
    name: str,
    result: Rule,
    *,
    exact: bool = False,
    fresh: bool = False,
    half: bool | None = None,
    rows: tuple[str, ...] = (),
    table: dict[str, Spec] | None = None,
) -> Callable[[Decorated], Decorated]:
    """Register the decorated function as the operation `name`.

    Args:
        name: MIL's name.
        result: rule for the element types of the outputs.
        exact: see `Spec`.
        fresh: see `Spec`; claim it only where torch always allocates.
        half: see `Spec`; as `exact` if None.
        rows: see `Spec`.
        table: where to register it; the table `OPS` if None.
    """
    target = OPS if table is None else table

    def register(function: Decorated) -> Decorated:
        if name in target:
            raise ValueError(f"operation '{name}' is registered twice")
        signature = inspect.signature(function).parameters
        kinds = {
            key: _kind(str(parameter.annotation))
            for key, parameter in signature.items()
            if key not in _SUPPLIED
        }
        target[name] = Spec(
            function,
            kinds,
            frozenset(key for key in kinds if signature[key].default is inspect._empty),
            _SUPPLIED & set(signature),
            result,
            exact,
            fresh,
            exact if half is None else half,
            rows,
        )
        return function

    return register


def _kind(annotation: str) -> str:
    if annotation in _KINDS:
        return _KINDS[annotation]
    return "plains" if annotation.startswith("Sequence[") else "plain"


def same(*names: str) -> Rule:
    """The outputs have the one element type that the named inputs share."""

    def rule(dtypes: Mapping[str, str], constants: Mapping[str, Any]) -> str:
        found = {dtypes[name] for name in names if name in dtypes}
        if len(found) != 1:
            told = f"mixes the element types {', '.join(sorted(found))}, which must be one"
            known = found == {"fp16", "fp32"}
            raise ArtifactError(f"{told}. {MIXED_ADVICE.rstrip('.')}" if known else told)
        return found.pop()

    return rule


def floats(*names: str) -> Rule:
    """As `same`, and the shared type must be a floating one."""
    shared = same(*names)

    def rule(dtypes: Mapping[str, str], constants: Mapping[str, Any]) -> str | tuple[str, ...]:
        found = shared(dtypes, constants)
        if found not in ("fp16", "fp32"):
            raise ArtifactError(f"is not defined for {found}")
        return found

    return rule


def fixed(dtype: str, *names: str) -> Rule:
    """The outputs have the type `dtype`; the named inputs must share a type."""
    shared = same(*names) if names else None

    def rule(dtypes: Mapping[str, str], constants: Mapping[str, Any]) -> str:
        if shared is not None:
            shared(dtypes, constants)
        return dtype

    return rule


def named_by(parameter: str, default: str | None = None) -> Rule:
    """The constant `parameter` names the outputs' type."""

    def rule(dtypes: Mapping[str, str], constants: Mapping[str, Any]) -> str:
        return str(constants.get(parameter, default))

    return rule


def integers(values: Ints) -> list[int]:
    """Return `values` as Python ints, whether they were constants or computed."""
    listed: Any = values.tolist() if isinstance(values, torch.Tensor) else values
    return [listed] if isinstance(listed, int) else list(listed)


def number(value: Number) -> float:
    """Return `value` as a Python number, whether it was a constant or computed."""
    return value.item() if isinstance(value, torch.Tensor) else value
