"""Quantized weights on their way into MIL: as they are, without the copies of the usual lowering.

Importing the module registers the lowerings with coremltools, in the place of ExecuTorch's, which
take two more bytes of memory for each weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil._deployment_compatibility import AvailableTarget
from coremltools.converters.mil.frontend._utils import (
    _construct_constexpr_lut_op,
    is_current_opset_version_compatible_with,
)
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
from coremltools.converters.mil.mil import types

# Registers lowerings of its own when it is imported, which must not come after ours.
from executorch.backends.apple.coreml.compiler import torch_ops

_AFFINE = ["torchao::dequantize_affine", "torchao.dequantize_affine"]
_CODEBOOK = ["quant::dequantize_codebook", "quant.dequantize_codebook"]
_LOOK_UPS = ["llm_coreml::expand_codebook", "llm_coreml.expand_codebook"]
_INTEGERS = {(-8, 7): "int4", (-128, 127): "int8"}


@register_torch_op(torch_alias=_AFFINE, override=True)  # type: ignore[untyped-decorator]
def dequantize_affine(context: Any, node: Any) -> None:
    """Lower int8 codes `[out, in]` with scales and offsets of groups of inputs.

    Codes of int8 stay so if they happen to fit int4; coremltools would narrow them, and then fail
    on integer offsets that do not fit.
    """
    if not is_current_opset_version_compatible_with(AvailableTarget.iOS18):
        torch_ops.dequantize_affine(context, node)  # which knows the operation that there is
        return
    codes, _, scale, offset, _, low, high, *_ = _values(context, node, [7, 8])
    rows = len(codes)
    scale = scale.reshape(rows, -1)
    parameters = {"data": _as(codes, _INTEGERS[int(low), int(high)]), "scale": scale}
    if offset is not None and np.any(offset):
        offset = offset.reshape(scale.shape)
        exact = np.issubdtype(offset.dtype, np.integer)
        parameters["offset"] = offset.astype(parameters["data"].dtype) if exact else offset
    context.add(mb.constexpr_blockwise_shift_scale(**parameters, name=node.name), node.name)


@register_torch_op(torch_alias=_CODEBOOK, override=True)  # type: ignore[untyped-decorator]
def dequantize_codebook(context: Any, node: Any) -> None:
    """Lower uint8 codes `[out, in]` into tables `[groups, 1, 2^bits, 1]`."""
    codes, tables, bits, *_ = _values(context, node, [4, 5])
    context.add(_looked_up(codes, tables, int(bits), name=node.name), node.name)


@register_torch_op(torch_alias=_LOOK_UPS, override=True)  # type: ignore[untyped-decorator]
def expand_codebook(context: Any, node: Any) -> None:
    """Lower to a table look-up, and a scaling of what it gives where there are scales."""
    codes, tables, scale, zero_point, bits = _values(context, node, [5])
    vectors = {"vector_axis": np.int32(0)} if tables.shape[3] > 1 else {}
    if scale is None:
        weight = _looked_up(codes, tables, int(bits), name=node.name, **vectors)
    else:
        looked_up = _looked_up(codes, tables, int(bits), **vectors)
        offset = {} if zero_point is None else {"offset": zero_point}
        weight = mb.constexpr_blockwise_shift_scale(
            data=looked_up, scale=scale, name=node.name, **offset
        )
    context.add(weight, node.name)


def _looked_up(codes: Any, tables: Any, bits: int, **given: Any) -> Any:
    """Return a look-up: of one table for the whole matrix where a system knows no others."""
    if not is_current_opset_version_compatible_with(AvailableTarget.iOS18):
        return _construct_constexpr_lut_op(codes.astype(np.uint8), tables, **given)
    indices = _as(codes, f"uint{bits}")
    return mb.constexpr_lut_to_dense(indices=indices, lut=tables, **given)


def _values(context: Any, node: Any, expected: list[int]) -> list[Any]:
    return [given and given.val for given in _get_inputs(context, node, expected=expected)]


def _as(codes: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Return codes, the same memory where they are bytes already, said to be of MIL's type."""
    narrow = codes if codes.dtype.itemsize == 1 else codes.astype(np.uint8)
    return narrow.view(types.nptype_from_builtin(types.string_to_builtin(name)))
