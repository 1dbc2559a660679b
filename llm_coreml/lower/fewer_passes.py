"""Graph passes that leave out operations which move numbers for nothing, or do a thing again.

They run where `--operations fewest` is asked for, and change no number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

# Places in a cache: layer, head, position, number.
_AXES = 4
_POSITION = np.array([0, 0, 1, 0], dtype=np.int32)


@register_pass(namespace="llm_coreml")
class join_concats(AbstractGraphPass):  # type: ignore[misc]
    """Put the parts of a cut layer beside others in one operation, not in two."""

    def apply(self, prog: Any) -> None:
        """Edit every function of the program in place."""
        for function in prog.functions.values():
            with function:
                for op in list(function.operations):
                    if op.op_type == "concat":
                        _join(function, op)


def _join(function: Any, op: Any) -> None:
    """Replace a concatenation of concatenations along the same axis that nothing else reads."""
    axis = op.axis.val % op.outputs[0].rank
    values: list[Any] = []
    inner = []
    for part in op.values:
        other = part.op
        if (
            other is not None
            and other.op_type == "concat"
            and len(part.child_ops) == 1
            and part not in function.outputs
            and other.axis.val % part.rank == axis
        ):
            inner.append(other)
            values.extend(other.values)
        else:
            values.append(part)
    if not inner or op.interleave.val or any(each.interleave.val for each in inner):
        return
    joined = mb.concat(values=values, axis=axis, name=op.name, before_op=op)
    function.replace_uses_of_var_after_op(op, op.outputs[0], joined)
    function.remove_ops([op, *inner])


@register_pass(namespace="llm_coreml")
class share_places(AbstractGraphPass):  # type: ignore[misc]
    """Compute once, for all layers, where each begins and ends to write to its cache."""

    def apply(self, prog: Any) -> None:
        """Edit every function of the program in place."""
        for function in prog.functions.values():
            places: dict[Any, list[Any]] = {}
            for op in function.operations:
                if op.op_type == "concat" and _is_place(op):
                    places.setdefault(op.values[1], []).append(op)
            with function:
                for position, ops in places.items():
                    if len(ops) > 1:
                        _at_once(function, position, ops)


def _is_place(op: Any) -> bool:
    """Return whether it puts a position between two numbers and one."""
    result = op.outputs[0]
    return (
        len(op.values) == 3
        and result.dtype == types.int32
        and result.shape == (_AXES,)
        and op.values[0].val is not None
        and op.values[0].shape == (2,)
        and op.values[1].val is None
        and op.values[1].shape == (1,)
        and op.values[2].val is not None
    )


def _at_once(function: Any, position: Any, ops: list[Any]) -> None:
    """Replace places that differ by numbers alone."""
    first = ops[0]
    numbers = [[*op.values[0].val, 0, *op.values[2].val] for op in ops]
    along = mb.mul(x=position, y=_POSITION, before_op=first)
    every = mb.add(x=np.array(numbers, dtype=np.int32), y=along, before_op=first)
    rows = mb.split(x=every, num_splits=len(ops), axis=0, before_op=first)
    for op, row in zip(ops, rows, strict=True):
        place = mb.squeeze(x=row, axes=[0], name=op.name, before_op=first)
        function.replace_uses_of_var_after_op(op, op.outputs[0], place)
    function.remove_ops(ops)


@register_pass(namespace="llm_coreml")
class reshape_for_transpose(AbstractGraphPass):  # type: ignore[misc]
    """Reshape where axes of one place alone are moved: in programs for one token, mostly."""

    def apply(self, prog: Any) -> None:
        """Edit every function of the program in place."""
        for function in prog.functions.values():
            with function:
                for op in list(function.operations):
                    if op.op_type == "transpose" and _moves_nothing(op):
                        _reshape(function, op)


def _moves_nothing(op: Any) -> bool:
    """Return whether all axes of more than one place keep their order."""
    shape = op.x.shape
    if not all(isinstance(size, (int, np.integer)) for size in shape):
        return False
    kept = [axis % len(shape) for axis in op.perm.val if shape[axis] != 1]
    return kept == sorted(kept)


def _reshape(function: Any, op: Any) -> None:
    shape = [int(size) for size in op.outputs[0].shape]
    same = mb.reshape(x=op.x, shape=shape, name=op.name, before_op=op)
    function.replace_uses_of_var_after_op(op, op.outputs[0], same)
    function.remove_ops([op])
