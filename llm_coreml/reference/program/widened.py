"""The same program with a row of logits for every token, where it slices the last one out.

    wide = widened(model.functions["main"])

Only the slice goes. What is computed of its row is computed of all rows then, by the operations
that stand there; sizes that were 1 because of the slice are known only when it runs.

Sums of fp32 come in another order where a product has one row, so `steady` operations compute such
a row among as many as a chunk has: by them the program itself gives the very bits that the same row
has among others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llm_coreml.artifact.mil import Constant, Function, NamedType, Operation, TensorType
from llm_coreml.reference.ops import Spec

# Products whose sums depend on how many rows there are, by the axis of the rows of `x`.
_PRODUCTS = {"linear": -2, "matmul": -2, "conv": -1}


def widened(function: Function) -> Function | None:
    """Return `function` without the slice of its last row; None if there is no such slice.

    None, too, where anything else than the first output, or a state, depends on it.
    """
    types = {item.name: item.type for item in function.inputs}
    types |= {item.name: item.type for step in function.operations for item in step.outputs}
    constants = {
        step.outputs[0].name: step.attributes["val"]
        for step in function.operations
        if step.type == "const" and "val" in step.attributes
    }
    for at in reversed(range(len(function.operations))):
        operation = function.operations[at]
        if not _takes_last(operation, types, constants):
            continue
        row, rest = operation.outputs[0].name, function.operations[at + 1 :]
        reached = _reached(row, rest)
        if reached is None or reached.isdisjoint(function.outputs[:1]):
            continue
        if not reached.isdisjoint(function.outputs[1:]):
            return None
        (source,) = operation.inputs["x"]
        assert isinstance(source, str)
        after = tuple(_replaced(step, row, source, reached) for step in rest)
        return replace(function, operations=(*function.operations[:at], *after))
    return None


def _takes_last(
    operation: Operation, types: Mapping[str, object], constants: Mapping[str, Constant]
) -> bool:
    """Return whether an operation takes the last of several entries of one axis, and all else."""
    if operation.type != "slice_by_index" or operation.inputs.keys() & {"stride", "squeeze_mask"}:
        return False
    (x,), (begin,) = operation.inputs["x"], operation.inputs.get("begin", (None,))
    given, result = types.get(x) if isinstance(x, str) else None, operation.outputs[0].type
    if not isinstance(given, TensorType) or not isinstance(result, TensorType):
        return False
    axes = [at for at, size in enumerate(given.shape) if size != result.shape[at]]
    constant = constants.get(begin) if isinstance(begin, str) else begin
    if len(axes) != 1 or result.shape[axes[0]] != 1 or constant is None:
        return False
    first, size = int(np.asarray(constant.value())[axes[0]]), given.shape[axes[0]]
    return first == -1 or (size is not None and first == size - 1)


def _reached(name: str, operations: tuple[Operation, ...]) -> set[str] | None:
    """Return the values that depend on one; None if a state or a branch does."""
    reached = {name}
    for operation in operations:
        if reached.isdisjoint(operation.names()):
            continue
        if operation.blocks or operation.type == "write_state":
            return None
        reached |= {item.name for item in operation.outputs}
    return reached


def _replaced(operation: Operation, row: str, source: str, reached: set[str]) -> Operation:
    """Return an operation that gets all rows in the place of one."""
    inputs = {
        key: tuple(source if item == row else item for item in bound)
        for key, bound in operation.inputs.items()
    }
    outputs = tuple(
        NamedType(item.name, _unsized(item.type)) if item.name in reached else item
        for item in operation.outputs
    )
    return replace(operation, inputs=inputs, outputs=outputs)


def _unsized(declared: Any) -> Any:
    if not isinstance(declared, TensorType):
        return declared
    return TensorType(declared.dtype, tuple(None if n == 1 else n for n in declared.shape))


@dataclass
class Rows:
    """How many rows a product has at least.

    Attributes:
        count: The number.
    """

    count: int = 1


def steady(ops: Mapping[str, Spec], rows: Rows) -> dict[str, Spec]:
    """Return operations that compute the product of a single row among as many as `rows` says."""
    among = {
        name: replace(ops[name], function=_among(ops[name].function, axis, rows))
        for name, axis in _PRODUCTS.items()
        if name in ops
    }
    return {**ops, **among}


def _among(function: Callable[..., Any], axis: int, rows: Rows) -> Callable[..., Any]:
    def run(*, x: torch.Tensor, **rest: Any) -> Any:
        # A convolution's rows are its last axis, and only where it has one row are all others one.
        single = x.dim() > 1 and x.shape[axis] == 1 and (axis == -2 or x.shape[2:].numel() == 1)
        if not single or rows.count == 1 or rest.get("transpose_x"):
            return function(x=x, **rest)
        sizes = list(x.shape)
        sizes[axis] = rows.count
        return function(x=x.expand(sizes).contiguous(), **rest).narrow(axis, rows.count - 1, 1)

    return run
