"""Graph passes of ours that run inside coremltools' pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil.passes.defs.cleanup.const_deduplication import (
    const_deduplication,
)
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

from llm_coreml.cuts import WHOLE, Cuts
from llm_coreml.errors import ConfigError, nearest
from llm_coreml.lower.channels_first import channels_first
from llm_coreml.lower.cut_passes import cut_names
from llm_coreml.lower.fewer_passes import join_concats, reshape_for_transpose, share_places
from llm_coreml.targets import Layout, Operations


@register_pass(namespace="llm_coreml")
class drop_repeated_state_writes(AbstractGraphPass):  # type: ignore[misc]
    """Remove a state write whose value is what the last write to that state returned.

    coremltools writes every mutated buffer once more at the end of the program. After writes in
    place, that is a copy of the whole cache for nothing.
    """

    def apply(self, prog: Any) -> None:
        """Edit every function of the program in place."""
        for function in prog.functions.values():
            last_write: dict[Any, Any] = {}
            repeated = []
            for op in function.operations:
                if op.op_type != "coreml_update_state":
                    continue
                if last_write.get(op.state) is op.value and not op.outputs[0].child_ops:
                    repeated.append(op)
                else:
                    last_write[op.state] = op.outputs[0]
            function.remove_ops(repeated)


@register_pass(namespace="llm_coreml")
class join_slices(AbstractGraphPass):  # type: ignore[misc]
    """Cut out of a cut in one operation.

    A layer's part of the cache is a row of it without the spare positions. In two steps, a device
    may copy it twice.
    """

    def apply(self, prog: Any) -> None:
        """Edit every function of the program in place."""
        for function in prog.functions.values():
            with function:
                for op in list(function.operations):
                    if op.op_type == "slice_by_index":
                        _join(function, op)


def _join(function: Any, op: Any) -> None:
    """Replace a slice of a slice that nothing else reads."""
    inner = op.x.op
    if inner is None or inner.op_type != "slice_by_index" or len(op.x.child_ops) > 1:
        return
    within, cut = _bounds(inner), _bounds(op)
    if within is None or cut is None:
        return
    begin = [start + first for (start, _), (first, _) in zip(within, cut, strict=True)]
    end = [start + last for (start, _), (_, last) in zip(within, cut, strict=True)]
    joined = mb.slice_by_index(
        x=inner.x,
        begin=np.array(begin, dtype=np.int32),
        end=np.array(end, dtype=np.int32),
        name=op.name,
        before_op=op,
    )
    function.replace_uses_of_var_after_op(op, op.outputs[0], joined)
    function.remove_ops([op, inner])


def _bounds(op: Any) -> list[tuple[int, int]] | None:
    """Return what a `slice_by_index` takes of each axis; None if that is no plain range."""
    given = {"begin": op.begin.val, "end": op.end.val}
    plain = all(
        part is None or not np.any(np.array(part.val) != usual)
        for part, usual in ((op.stride, 1), (op.squeeze_mask, False))
    )
    if not plain or any(value is None for value in given.values()):
        return None
    found = []
    for axis, size in enumerate(op.x.shape):
        if not isinstance(size, (int, np.integer)):
            return None
        masks = (op.begin_mask, op.end_mask)
        first, last = (mask is not None and bool(mask.val[axis]) for mask in masks)
        begin, end = int(given["begin"][axis]), int(given["end"][axis])
        begin, end = (value + int(size) if value < 0 else value for value in (begin, end))
        found.append((0 if first else begin, int(size) if last else min(end, int(size))))
    return found


@register_pass(namespace="llm_coreml")
class share_equal_constants(const_deduplication):  # type: ignore[misc]
    """Store equal constants once, as coremltools' own pass does, but compare them exactly.

    Its comparison within a tolerance takes 30 bytes of memory per weight and half of the lowering's
    time on a tied token table of 128 thousand rows.
    """

    @staticmethod
    def find_constants(blocks: list[Any]) -> dict[Any, list[Any]]:
        """Return each distinct constant with those that equal it."""
        groups: dict[Any, list[Any]] = {}
        duplicates: dict[Any, list[Any]] = {}
        operations = [op for block in blocks for op in block.operations]
        for op in operations:
            if op.op_type != "const":
                continue
            var = op.outputs[0]
            if not isinstance(var.val, np.ndarray) or var.val.size < _SHARED_SIZE:
                continue
            start = var.val.reshape(-1)[:100].tobytes()
            key = (var.dtype, getattr(op, "weight_key", None), var.shape, start)
            group = groups.setdefault(key, [])
            equal = next((known for known in group if np.array_equal(known.val, var.val)), None)
            if equal is None:
                group.append(var)
                duplicates[var] = []
            else:
                duplicates[equal].append(var)
        return duplicates


# Fewer elements are stored in the program itself.
_SHARED_SIZE = 100
# It scales tables rather than what is looked up in them, which gives every scale its own table.
_OMITTED = "common::canonicalize_quantized_lut_pattern"
_REPLACED = {"common::const_deduplication": "llm_coreml::share_equal_constants"}


def pass_names(
    chosen: Sequence[str] | None = None,
    cuts: Cuts = WHOLE,
    layout: Layout = "linear",
    operations: Operations = "usual",
) -> list[str]:
    """Return what coremltools is to run.

    Args:
        cuts: What is cut, before all else.
        layout: What linear layers are.
        operations: Whether they are to be as few as are known.
        chosen: All passes, or each that is left out of the usual ones, with a hyphen before its
            name; None is coremltools' default pipeline, all but one pass, with ours in it and
            around it.

    Raises:
        ConfigError: there is no such pass, or the usual ones do not have it.
    """
    default = ct.PassPipeline.DEFAULT.passes
    names = [_REPLACED.get(name, name) for name in default if name != _OMITTED]
    cutting = cut_names(cuts)
    last = ["llm_coreml::drop_repeated_state_writes"]
    if operations == "fewest":
        cutting.append(f"llm_coreml::{join_concats.__name__}")
        last += [f"llm_coreml::{each.__name__}" for each in (share_places, reshape_for_transpose)]
    if layout == "conv":
        cutting.append(f"llm_coreml::{channels_first.__name__}")
    usual = [*cutting, "llm_coreml::join_slices", *names, *last]
    if chosen is None:
        return usual
    left_out = {name[1:] for name in chosen if name.startswith("-")}
    known = usual if left_out else PASS_REGISTRY.passes
    for name in left_out or chosen:
        if name not in known:
            told = "the usual passes do not hold" if left_out else "coremltools has no pass"
            raise ConfigError(f"--passes: {told} '{name}'.{nearest(name, known)}")
    return [name for name in usual if name not in left_out] if left_out else [*cutting, *chosen]
