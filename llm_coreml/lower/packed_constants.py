"""Constants of a program made anew, each packed as it was.

rebuilt(op.weight, change=lambda part: part.val[:8], table=lambda lut: lut.val[:1], before=op)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coremltools.converters.mil import Builder as mb


def rebuilt(
    weight: Any, change: Callable[[Any], Any], table: Callable[[Any], Any], before: Any
) -> Any:
    """Return a constant of which every part is changed: numbers, or codes, scales and offsets.

    Args:
        weight: What a `const` or a `constexpr_...` gives.
        change: Gives an array for each part that is plain.
        table: Gives an array for each table that is looked up in.
        before: The operation before which it is put.
    """
    op = weight.op

    def changed(part: Any) -> Any:
        if part.op.op_type.startswith("constexpr_"):
            return rebuilt(part, change, table, before)
        return change(part)

    if op.op_type == "constexpr_lut_to_dense":
        vectors = {} if op.vector_axis is None else {"vector_axis": op.vector_axis.val}
        return mb.constexpr_lut_to_dense(
            indices=changed(op.indices), lut=table(op.lut), **vectors, before_op=before
        )
    if op.op_type == "constexpr_blockwise_shift_scale":
        offset = {} if op.offset is None else {"offset": changed(op.offset)}
        return mb.constexpr_blockwise_shift_scale(
            data=changed(op.data), scale=changed(op.scale), **offset, before_op=before
        )
    return mb.const(val=change(weight), before_op=before)
