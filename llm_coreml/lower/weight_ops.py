"""Quantized weights on their way into MIL: as they are, without the copies of the usual lowering.

Importing the module registers the lowerings with coremltools, in the place of ExecuTorch's, which
take two more bytes of memory for each weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil._deployment_compatibility import AvailableTarget
from coremltools.converters.mil.frontend._utils import is_current_opset_version_compatible_with
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
from coremltools.converters.mil.mil import types

# Registers lowerings of its own when it is imported, which must not come after ours.
from executorch.backends.apple.coreml.compiler import torch_ops

_AFFINE = ["torchao::dequantize_affine", "torchao.dequantize_affine"]
_CODEBOOK = ["quant::dequantize_codebook", "quant.dequantize_codebook"]
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
    indices = _as(codes, f"uint{int(bits)}")
    context.add(mb.constexpr_lut_to_dense(indices=indices, lut=tables, name=node.name), node.name)


def _values(context: Any, node: Any, expected: list[int]) -> list[Any]:
    return [given and given.val for given in _get_inputs(context, node, expected=expected)]


def _as(codes: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Return codes, the same memory where they are bytes already, said to be of MIL's type."""
    narrow = codes if codes.dtype.itemsize == 1 else codes.astype(np.uint8)
    return narrow.view(types.nptype_from_builtin(types.string_to_builtin(name)))
