"""A graph pass that computes linear layers as convolutions of one place, channels first.

A value `[1, S, C]` becomes `[1, C, 1, S]`, a linear layer a convolution whose weight, packed as it
was, is `[out, in, 1, 1]`, and what lies between layers, number by number or along the channels, is
done there, too. That is the layout in which Apple's own transformers for the Neural Engine compute
(machinelearning.apple.com/research/neural-engine-transformers).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass

from llm_coreml.lower.packed_constants import rebuilt

_UNARY = frozenset(
    {
        *("abs", "silu", "sigmoid", "tanh", "relu", "exp", "sqrt", "square", "rsqrt"),
        *("gelu", "clip", "inverse"),
    }
)
_BINARY = frozenset({"add", "sub", "mul", "real_div", "maximum", "minimum", "pow"})
_REDUCTIONS = frozenset(
    {"reduce_max", "reduce_min", "reduce_sum", "reduce_mean", "reduce_sum_square", "reduce_l2_norm"}
)


@register_pass(namespace="llm_coreml")
class channels_first(AbstractGraphPass):  # type: ignore[misc]
    """Compute in `[1, C, 1, S]` what is linear, and what can follow it there."""

    def apply(self, prog: Any) -> None:
        """Edit every function of the program in place."""
        for function in prog.functions.values():
            with function:
                _Rewriting(function).run()


class _Rewriting:
    """A function on its way to the other layout.

    Args:
        function: Of a program; edited in place.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        # The value that has taken the place of another, which may still be read.
        self._moved: dict[Any, Any] = {}
        # The same of values that stay, and are read by what has moved.
        self._turned: dict[Any, Any] = {}

    def run(self) -> None:
        """Move every operation that can be, then hand back what others read."""
        for op in list(self._function.operations):
            moved = self._moved_result(op)
            if moved is not None:
                self._moved[op.outputs[0]] = moved
        for old, new in self._moved.items():
            readers = [op for op in old.child_ops if op.outputs[0] not in self._moved]
            if readers or old in self._function.outputs:
                self._hand_back(old, new)
        for old in reversed(self._moved):
            if not old.child_ops and old not in self._function.outputs:
                self._function.remove_ops([old.op])

    def _moved_result(self, op: Any) -> Any:
        """Return what an operation gives, channels first; None if it stays as it is."""
        kind = op.op_type
        if kind == "linear" and op.x.rank == 3:
            return self._convolved(op)
        if len(op.outputs) != 1 or op.outputs[0].rank != 3 or not self._reads_moved(op):
            return None
        build: Any = getattr(mb, kind, None)
        if kind in _UNARY:
            return build(x=self._first(op.x, op), **_numbers(op), before_op=op)
        if kind in _BINARY:
            x, y = (self._operand(part, op) for part in (op.x, op.y))
            return None if x is None or y is None else build(x=x, y=y, before_op=op)
        along = op.axes.val.tolist() if kind in _REDUCTIONS and op.axes is not None else []
        if along in ([-1], [2]) and op.keep_dims.val:
            x = self._first(op.x, op)
            return build(x=x, axes=[1], keep_dims=True, before_op=op)
        if kind == "concat" and op.axis.val in (-1, 2):
            values = [self._first(part, op) for part in op.values]
            return mb.concat(values=values, axis=1, before_op=op)
        return self._along_channels(op)

    def _along_channels(self, op: Any) -> Any:
        """Return what a layer norm, a pad or a cut of channels gives; None if it is no such."""
        kind = op.op_type
        if kind == "layer_norm" and op.axes.val.tolist() in ([-1], [2]):
            if op.gamma is not None or op.beta is not None:
                return None
            x = self._first(op.x, op)
            return mb.layer_norm(x=x, axes=[1], epsilon=op.epsilon.val, before_op=op)
        if kind == "pad" and op.mode.val == "constant" and not any(op.pad.val[:-2]):
            pad = [0, 0, *op.pad.val[-2:].tolist(), 0, 0, 0, 0]
            value = op.constant_val.val
            x = self._first(op.x, op)
            return mb.pad(x=x, pad=pad, mode="constant", constant_val=value, before_op=op)
        if kind == "slice_by_index" and _cuts_channels(op):
            ends = (op.begin.val, op.end.val)
            begin, end = ([0, int(each[-1]), 0, 0] for each in ends)
            masks = [True, False, True, True]
            masks_of = {"begin_mask": masks, "end_mask": masks}
            x = self._first(op.x, op)
            return mb.slice_by_index(x=x, begin=begin, end=end, **masks_of, before_op=op)
        return None

    def _reads_moved(self, op: Any) -> bool:
        """Return whether it reads a result that has moved: others stay where they are."""
        read = [*op.values] if op.op_type == "concat" else [op.inputs.get("x"), op.inputs.get("y")]
        return any(part in self._moved for part in read if part is not None)

    def _convolved(self, op: Any) -> Any:
        bias = {} if op.bias is None or not np.any(op.bias.val) else {"bias": op.bias.val}
        weight = _as_kernel(op.weight, op)
        name = f"{op.name}_channels"
        x = self._first(op.x, op)
        return mb.conv(x=x, weight=weight, pad_type="valid", **bias, name=name, before_op=op)

    def _operand(self, var: Any, op: Any) -> Any:
        """Return what is added to or multiplied with, channels first; None if it has no such."""
        if var.val is None:
            return self._first(var, op) if var.rank == 3 else None
        value = np.asarray(var.val)
        if value.size == 1:
            return value.reshape(-1)[0]
        if any(size != 1 for size in value.shape[:-1]):
            return None
        return value.reshape(1, -1, 1, 1)

    def _first(self, var: Any, op: Any) -> Any:
        """Return a value `[1, S, C]` as `[1, C, 1, S]`."""
        if var in self._moved:
            return self._moved[var]
        if var not in self._turned:
            turned = mb.transpose(x=var, perm=[0, 2, 1], before_op=op)
            self._turned[var] = mb.expand_dims(x=turned, axes=[2], before_op=op)
        return self._turned[var]

    def _hand_back(self, old: Any, new: Any) -> None:
        """Give those that stayed a value as they read it."""
        op = old.op
        flat = mb.squeeze(x=new, axes=[2], before_op=op)
        back = mb.transpose(x=flat, perm=[0, 2, 1], name=op.name, before_op=op)
        self._function.replace_uses_of_var_after_op(op, old, back, force_replace=True)


def _cuts_channels(op: Any) -> bool:
    """Return whether a slice takes channels alone, from one to another, and every row."""
    if op.begin.val is None or op.end.val is None:
        return False
    plain = (op.stride is None or set(op.stride.val.tolist()) == {1}) and (
        op.squeeze_mask is None or not op.squeeze_mask.val.any()
    )
    whole = all(
        (op.begin.val[axis] == 0 or (op.begin_mask is not None and op.begin_mask.val[axis]))
        and (
            op.end.val[axis] == op.x.shape[axis]
            or (op.end_mask is not None and op.end_mask.val[axis])
        )
        for axis in (0, 1)
    )
    last = [mask is not None and mask.val[2] for mask in (op.begin_mask, op.end_mask)]
    return plain and whole and not any(last)


def _numbers(op: Any) -> dict[str, Any]:
    """Return what an operation of one value is told beside it."""
    return {
        name: part.val
        for name, part in op.inputs.items()
        if name != "x" and part is not None and part.val is not None
    }


def _as_kernel(weight: Any, before: Any) -> Any:
    """Return a constant `[out, in]` as `[out, in, 1, 1]`, packed as it is packed."""

    def widened(part: Any) -> Any:
        return part.val.reshape(*part.shape, 1, 1)

    def table(lut: Any) -> Any:
        rows, columns, *entries = lut.shape
        return lut.val.reshape(rows, columns, 1, 1, *entries)

    return rebuilt(weight, widened, table, before)
