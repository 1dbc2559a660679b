"""What an operation's function is called with: tensors, Python values and element types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_coreml.artifact.mil import Binding, Constant, Operation, TensorType
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops import Spec
from llm_coreml.reference.program.constants import Source


@dataclass(frozen=True, eq=False)
class Arguments:
    """An operation's inputs, sorted.

    Attributes:
        tensors: parameter to the bindings of its tensor, or of its list of tensors.
        plain: parameter to Python value.
        dtypes: parameter to MIL's name of its element type.
    """

    tensors: dict[str, tuple[Binding, ...]]
    plain: dict[str, Any]
    dtypes: dict[str, str]


def arguments(
    operation: Operation,
    spec: Spec,
    constants: Mapping[str, Source],
    types: Mapping[str, TensorType],
) -> Arguments:
    """Sort the inputs of `operation` by what its function expects.

    Args:
        operation: the operation.
        spec: its function and parameters.
        constants: the constants defined so far, by name.
        types: the declared types of the values defined so far, by name.

    Raises:
        ArtifactError: a parameter is unknown, missing, or computed where it must be constant.
    """
    who = label(operation)
    bindings = {
        **{key: (value,) for key, value in operation.attributes.items()},
        **operation.inputs,
    }
    found = Arguments({}, {}, {})
    for key, bound in bindings.items():
        kind = spec.parameters.get(key)
        if kind is None:
            raise ArtifactError(
                f"{who} has the parameter '{key}', which the reference runtime does not know."
            )
        if kind not in ("tensors", "plains") and len(bound) != 1:
            raise ArtifactError(f"{who} binds '{key}' to {len(bound)} values.")
        dtypes = {_dtype(binding, types) for binding in bound} - {None}
        if len(dtypes) > 1:
            raise ArtifactError(f"{who} mixes element types in '{key}'.")
        found.dtypes.update((key, dtype) for dtype in dtypes if dtype is not None)
        held = [constants.get(item) if isinstance(item, str) else item for item in bound]
        if kind in ("tensor", "tensors"):
            found.tensors[key] = bound
        elif all(isinstance(item, Constant) for item in held):
            values = [_python(item) for item in held if isinstance(item, Constant)]
            found.plain[key] = values if kind == "plains" else values[0]
        elif kind == "dynamic":
            found.tensors[key] = bound
        else:
            raise ArtifactError(f"{who} computes '{key}', which must be a constant.")
    missing = spec.required - set(bindings)
    if missing:
        raise ArtifactError(f"{who} lacks {', '.join(sorted(missing))}.")
    return found


def result_types(operation: Operation, spec: Spec, given: Arguments) -> tuple[str, ...]:
    """Return the element type of each output, which must be what the program declares.

    Raises:
        ArtifactError: the operation is not defined for its inputs, or declares another type.
    """
    who = label(operation)
    try:
        result = spec.result(given.dtypes, given.plain)
    except ArtifactError as error:
        raise ArtifactError(f"{who} {error}.") from error
    except KeyError as error:
        raise ArtifactError(f"{who} has no element type for {error}.") from error
    several = (result,) if isinstance(result, str) else result
    found = []
    for number, item in enumerate(operation.outputs):
        dtype = several[min(number, len(several) - 1)]
        if not isinstance(item.type, TensorType) or item.type.dtype != dtype:
            raise ArtifactError(
                f"{who} declares the result '{item.name}' as {item.type}, "
                f"but its inputs make it {dtype}."
            )
        found.append(dtype)
    return tuple(found)


def label(operation: Operation) -> str:
    """Return what errors call the operation."""
    return f"Operation '{operation.name}' ({operation.type})"


def _dtype(binding: Binding, types: Mapping[str, TensorType]) -> str | None:
    if isinstance(binding, Constant):
        return binding.type.dtype if isinstance(binding.type, TensorType) else None
    return types[binding].dtype if binding in types else None


def _python(constant: Constant) -> Any:
    value = constant.value()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value
