"""Runs one operation in the reference as coremltools builds it, without a file in between.

    case = build("gather", x=array, indices=places, axis=1)
    case.inferred    # what coremltools' value inference gives, or None
    case.run()       # what the reference computes

Arrays become inputs of a function where the reference takes a tensor, anything else constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function as Building
from coremltools.converters.mil.mil import types

from llm_coreml.artifact import mil
from llm_coreml.artifact.dtypes import DTYPES
from llm_coreml.reference.ops import OPS
from llm_coreml.reference.ops.storage import to_tensor
from llm_coreml.reference.program.compiler import compile_function
from llm_coreml.reference.program.execution import Execution
from llm_coreml.reference.program.steps import run_all

IOS18 = ct.target.iOS18


@dataclass(frozen=True, eq=False)
class SingleOp:
    """An operation that coremltools has built from constants, and the parameters it was given."""

    operation: Any
    given: dict[str, Any]
    computed: frozenset[str]

    @property
    def inferred(self) -> list[np.ndarray] | None:
        """What coremltools gives, in the declared element types."""
        if self.operation.op_type.startswith("constexpr_"):
            values: Any = self.operation.materialized_val_inference()
            values = values if isinstance(values, tuple) else (values,)
        else:
            values = [output.val for output in self.operation.outputs]
        if any(value is None for value in values):
            return None
        return [
            np.asarray(value).astype(DTYPES[_dtype(output)].array)
            for value, output in zip(values, self.operation.outputs, strict=True)
        ]

    def call(self, *, dynamic: bool, device: str = "cpu") -> tuple[Any, dict[str, Any]]:
        """Return the operation's function and its arguments, as the compiler would pass them.

        Args:
            dynamic: whether what may be computed is given as a tensor, not as a constant.
            device: where the function creates what has no input.
        """
        kinds = OPS[self.operation.op_type].parameters
        arguments: dict[str, Any] = {}
        for key in self.given:
            bound = self.operation.inputs[key]
            variables = bound if isinstance(bound, (list, tuple)) else [bound]
            arrays = [self._array(key, place) for place in range(len(variables))]
            if kinds[key] in ("tensor", "tensors") or (kinds[key] == "dynamic" and dynamic):
                values: list[Any] = [
                    to_tensor(array, _dtype(var))
                    for array, var in zip(arrays, variables, strict=True)
                ]
            else:
                values = [item if isinstance(item, str) else item.tolist() for item in arrays]
            arguments[key] = values if kinds[key] in ("tensors", "plains") else values[0]
        spec = OPS[self.operation.op_type]
        if "declared" in spec.supplied:
            arguments["declared"] = _dtype(self.operation.outputs[0])
        if "device" in spec.supplied:
            arguments["device"] = torch.device(device)
        return spec.function, arguments

    def _array(self, key: str, place: int) -> Any:
        """Return a parameter's value; the given one, since value inference writes into its own."""
        bound = self.operation.inputs[key]
        var = bound[place] if isinstance(bound, (list, tuple)) else bound
        if isinstance(var.val, str):
            return var.val
        value = self.given.get(key, var.val)
        value = value[place] if isinstance(bound, (list, tuple)) else value
        return np.asarray(value).astype(DTYPES[_dtype(var)].array)

    def run(self, *, defaults: bool = False) -> list[np.ndarray]:
        """Return the reference's results; with `defaults`, optional parameters are written out."""
        inputs: dict[str, tuple[mil.Binding, ...]] = {}
        features: list[mil.NamedType] = []
        values: dict[str, torch.Tensor] = {}
        constants: list[mil.Operation] = []
        for key, bound in self.operation.inputs.items():
            if key not in self.given and not defaults:
                continue
            names = []
            for place, var in enumerate(bound if isinstance(bound, (list, tuple)) else [bound]):
                name = f"{key}_{place}"
                names.append(name)
                if key in self.computed:
                    features.append(mil.NamedType(name, declared(var)))
                    values[name] = to_tensor(self._array(key, place), _dtype(var))
                else:
                    constants.append(_constant(name, var, self._array(key, place)))
            inputs[key] = tuple(names)
        outputs = tuple(
            mil.NamedType(f"out_{number}", declared(var))
            for number, var in enumerate(self.operation.outputs)
        )
        main = mil.Operation(self.operation.op_type, "tested", inputs, {}, outputs)
        function = mil.Function(
            "main",
            "CoreML8",
            tuple(features),
            tuple(item.name for item in outputs),
            (*constants, main),
        )
        return _execute(function, values)


def build(name: str, target: Any = IOS18, **arguments: Any) -> SingleOp:
    """Build the operation `name` of the opset `target` from constants."""
    kinds = OPS[name].parameters
    with Building({}, opset_version=target):
        constants = {
            key: [mb.const(val=item.copy()) for item in value]
            if kinds[key] == "tensors"
            else mb.const(val=value.copy())
            if isinstance(value, (np.ndarray, np.generic))
            else value
            for key, value in arguments.items()
        }
        result = getattr(mb, name)(**constants)
    operation = (result[0] if isinstance(result, (list, tuple)) else result).op
    computed = {
        key
        for key, value in arguments.items()
        if kinds[key] == "tensors"
        or (isinstance(value, np.ndarray) and kinds[key] in ("tensor", "dynamic"))
    }
    if name.startswith("constexpr_"):
        computed = set()
    return SingleOp(operation, arguments, frozenset(computed))


def evaluate(name: str, target: Any = IOS18, **arguments: Any) -> list[np.ndarray]:
    """Return the reference's results, which must not depend on whether defaults are written out."""
    case = build(name, target, **arguments)
    brief, full = case.run(), case.run(defaults=True)
    for one, other in zip(brief, full, strict=True):
        np.testing.assert_array_equal(one, other, "a default differs from coremltools'")
    return brief


def agree(
    name: str, target: Any = IOS18, tolerance: float = 2e-6, **arguments: Any
) -> list[np.ndarray]:
    """Compare the reference with value inference; floats relative to `tolerance`, others exactly.

    Results in fp16 are compared with those that coremltools infers for the same values in fp32,
    rounded once: within one unit in the last place.
    """
    case = build(name, target, **arguments)
    widened = {key: _widened(value) for key, value in arguments.items()}
    expected = build(name, target, **widened).inferred
    assert expected is not None, f"coremltools infers no value for {name}"
    actual = evaluate(name, target, **arguments)
    for value, wanted, output in zip(actual, expected, case.operation.outputs, strict=True):
        assert value.dtype == DTYPES[_dtype(output)].array
        close(value, wanted, tolerance)
    return actual


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    """Compare shapes and values; fp16 within one unit in the last place."""
    assert actual.shape == expected.shape
    if actual.dtype.kind != "f":
        np.testing.assert_array_equal(actual, expected.astype(actual.dtype))
        return
    with np.errstate(over="ignore"):
        expected = expected.astype(actual.dtype)
    if actual.dtype == np.float16:
        tolerance = max(tolerance, 2**-10)
    np.testing.assert_allclose(
        actual.astype(np.float64), expected.astype(np.float64), tolerance, tolerance
    )


def declared(var: Any) -> mil.TensorType:
    """Return the reference's type for coremltools' variable."""
    sizes = tuple(int(size) if isinstance(size, (int, np.integer)) else None for size in var.shape)
    return mil.TensorType(_dtype(var), sizes)


def _dtype(var: Any) -> str:
    name = types.builtin_to_string(var.dtype)
    return "string" if name == "str" else str(name)


def _constant(name: str, var: Any, content: Any) -> mil.Operation:
    value = mil.Constant(declared(var), content)
    return mil.Operation("const", name, {}, {"val": value}, (mil.NamedType(name, value.type),))


def _execute(function: mil.Function, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    with torch.inference_mode():
        pool = Execution().pool()
        compiled = compile_function(function, pool)
        values = compiled.initial.copy()
        for name, slot in compiled.inputs.items():
            values[slot] = inputs[name].to(pool.numerics.held(compiled.types[name].dtype))
        run_all(compiled.steps, values)
    return [
        values[compiled.outputs[name]].numpy().astype(DTYPES[compiled.types[name].dtype].array)
        for name in function.outputs
    ]


def _widened(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_widened(item) for item in value]
    is_half = isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float16
    return value.astype(np.float32) if is_half else value
