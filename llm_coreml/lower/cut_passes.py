"""Graph passes that cut linear layers, tables of tokens and the choice of tokens, see `cuts`.

Packed weights are cut as they are, codes, scales and tables by rows, so that every part holds the
numbers that the whole one held. A pass's name says how it cuts: `llm_coreml::cut_linears_1024_0`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

from llm_coreml.cuts import Cuts, ranges, unit_of_blocks
from llm_coreml.lower.packed_constants import rebuilt

_NAME = re.compile(r"llm_coreml::(cut_linears|cut_tables|cut_choices)_(\d+)_(\d+)")
# What may lie between a linear layer and the choice among its outputs, each number by itself.
_UNARY = frozenset({"tanh", "cast"})
_BINARY = frozenset({"mul", "real_div"})


def cut_names(cuts: Cuts) -> list[str]:
    """Return the passes that cut, by name, in order; coremltools knows them from now on."""
    names = []
    if cuts.linear or cuts.widest:
        names.append(f"llm_coreml::cut_linears_{cuts.linear or 0}_{cuts.widest or 0}")
        names.append("llm_coreml::cut_choices_0_0")
    if cuts.gather:
        names.append(f"llm_coreml::cut_tables_{cuts.gather}_0")
    for name in names:
        _register(name)
    return names


def _register(name: str) -> None:
    found = _NAME.fullmatch(name)
    assert found is not None
    kind, first, second = found[1], int(found[2]) or None, int(found[3]) or None
    edits: dict[str, Callable[[Any, Any], None]] = {
        "cut_linears": lambda function, op: _cut_linear(function, op, Cuts(first, second)),
        "cut_tables": lambda function, op: _cut_gather(function, op, Cuts(gather=first)),
        "cut_choices": _cut_choice,
    }
    edited = {"cut_linears": "linear", "cut_tables": "gather", "cut_choices": "topk"}[kind]
    PASS_REGISTRY.passes[name] = _Cutting(name, edited, edits[kind])


class _Cutting(AbstractGraphPass):  # type: ignore[misc]
    """Edits every operation of one type.

    Args:
        name: As coremltools calls the pass.
        edited: The type.
        edit: Called with a function of a program and such an operation of it.
    """

    def __init__(self, name: str, edited: str, edit: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._name, self._edited, self._edit = name, edited, edit

    def __str__(self) -> str:
        return self._name

    def apply(self, prog: Any) -> None:
        """Edit every function of the program in place."""
        for function in prog.functions.values():
            with function:
                for op in list(function.operations):
                    if op.op_type == self._edited:
                        self._edit(function, op)


def _cut_linear(function: Any, op: Any, cuts: Cuts) -> None:
    """Put parts in the place of a linear layer, and what they give side by side."""
    rows = op.weight.shape[0]
    bounds = cuts.of_linear(rows, _unit(op.weight))
    if len(bounds) == 2:
        return
    parts = []
    for start, stop in ranges(bounds):
        name = f"{op.name}_rows_{start}_{stop}"
        bias = {} if op.bias is None else {"bias": op.bias.val[start:stop]}
        weight = _rows(op.weight, start, stop, op)
        parts.append(mb.linear(x=op.x, weight=weight, **bias, name=name, before_op=op))
    whole = mb.concat(values=parts, axis=-1, name=op.name, before_op=op)
    _replace(function, op, whole)


def _cut_gather(function: Any, op: Any, cuts: Cuts) -> None:
    """Look a token up in each part of a table, and take what the right one gives."""
    table = op.x
    constant = table.op is not None and (
        table.op.op_type == "const" or table.op.op_type.startswith("constexpr_")
    )
    if not constant or table.rank != 2 or op.axis.val != 0:
        return
    bounds = cuts.of_table(table.shape[0], _unit(table))
    if len(bounds) == 2:
        return
    found: Any = None
    for number, (start, stop) in enumerate(ranges(bounds)):
        last = number == len(bounds) - 2
        place = op.indices
        if start:
            behind = mb.sub(x=place, y=np.int32(start), before_op=op)
            place = mb.maximum(x=behind, y=np.int32(0), before_op=op)
        if not last:
            place = mb.minimum(x=place, y=np.int32(stop - start - 1), before_op=op)
        rows = mb.gather(
            x=_rows(table, start, stop, op),
            indices=place,
            axis=0,
            name=op.name if last and found is None else f"{op.name}_rows_{start}_{stop}",
            before_op=op,
        )
        if found is None:
            found = rows
            continue
        here = mb.greater_equal(x=op.indices, y=np.int32(start), before_op=op)
        here = mb.expand_dims(x=here, axes=[-1], before_op=op)
        name = op.name if last else f"{op.name}_up_to_{stop}"
        found = mb.select(cond=here, a=rows, b=found, name=name, before_op=op)
    _replace(function, op, found)


def _cut_choice(function: Any, op: Any) -> None:
    """Choose among the outputs of each part of a cut layer, and then among the chosen."""
    chain, concat = _chain_to_concat(op.x)
    count = int(op.k.val)
    if concat is None or any(part.shape[-1] < count for part in concat.values):
        return
    values, tokens, first = [], [], 0
    for part in concat.values:
        width, given = part.shape[-1], part
        for step in reversed(chain):
            given = _again(step, given, op)
        best, place = mb.topk(x=given, k=count, axis=-1, ascending=False, before_op=op)
        values.append(best)
        tokens.append(mb.add(x=place, y=np.int32(first), before_op=op) if first else place)
        first += width
    among = mb.concat(values=values, axis=-1, before_op=op)
    ids = mb.concat(values=tokens, axis=-1, before_op=op)
    best, place = mb.topk(x=among, k=count, axis=-1, ascending=False, before_op=op)
    chosen = mb.gather_along_axis(x=ids, indices=place, axis=-1, before_op=op)
    for old, new in zip(op.outputs, (best, chosen), strict=True):
        new.name = old.name
        function.replace_uses_of_var_after_op(
            op, old, new, no_check_var_types=True, force_replace=True
        )
    function.remove_ops([op])


def _chain_to_concat(var: Any) -> tuple[list[Any], Any]:
    """Return what is done to a concatenation, last first, and itself; None if it is none."""
    chain: list[Any] = []
    while var.op is not None and len(var.child_ops) == 1:
        op = var.op
        if op.op_type == "concat" and op.axis.val in (-1, var.rank - 1):
            return chain, op
        by_number = op.op_type in _BINARY and op.y.val is not None and np.size(op.y.val) == 1
        if op.op_type not in _UNARY and not by_number:
            return chain, None
        chain.append(op)
        var = op.x
    return chain, None


def _again(step: Any, given: Any, before: Any) -> Any:
    """Do to a part what `step` does to the whole."""
    if step.op_type == "cast":
        return mb.cast(x=given, dtype=step.dtype.val, before_op=before)
    build = getattr(mb, step.op_type)
    other = {"y": step.y.val} if step.op_type in _BINARY else {}
    return build(x=given, **other, before_op=before)


def _unit(weight: Any) -> int:
    """Return how many rows of a constant belong together, see `cut_rows.unit_of`."""
    op, rows, blocks, width = weight.op, weight.shape[0], [], 1
    while op.op_type.startswith("constexpr_"):
        if op.op_type == "constexpr_lut_to_dense":
            blocks.append(op.lut.shape[0])
            width = rows // op.indices.shape[0]
            break
        blocks.append(op.scale.shape[0])
        op = op.data.op
    return unit_of_blocks(rows, blocks, width)


def _rows(weight: Any, start: int, stop: int, before: Any) -> Any:
    """Return rows of a constant, packed as it is packed."""
    rows = weight.shape[0]

    def cut(part: Any) -> Any:
        """Return what the rows read of `part`, whose first axis has as many or fewer blocks."""
        count = part.shape[0]
        return part.val if count == 1 else part.val[start * count // rows : stop * count // rows]

    return rebuilt(weight, cut, cut, before)


def _replace(function: Any, op: Any, var: Any) -> None:
    function.replace_uses_of_var_after_op(op, op.outputs[0], var, force_replace=True)
    function.remove_ops([op])
