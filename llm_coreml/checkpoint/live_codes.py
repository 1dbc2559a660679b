"""Values of a matrix that bitsandbytes has quantized as a model was loaded.

if is_of_bitsandbytes(parameter):
    values_of(module, parameter)         # of `shape_of(parameter)`
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def is_of_bitsandbytes(parameter: torch.Tensor) -> bool:
    """Say whether a parameter holds codes of bitsandbytes."""
    return type(parameter).__module__.partition(".")[0] == "bitsandbytes"


def shape_of(codes: Any) -> tuple[int, ...]:
    """Return the shape of the values."""
    return tuple(codes.shape if codes.dtype == torch.int8 else _state(codes, codes).shape)


def values_of(module: Any, codes: Any) -> torch.Tensor:
    """Return the values that a parameter of `module` stands for, in fp32."""
    from bitsandbytes import functional

    held, state = codes.data.float(), _state(codes, codes)
    if state is not codes:
        data, state = _unpacked(codes.data, state)
        values: torch.Tensor = functional.dequantize_4bit(data, state).float()
        return values.reshape(tuple(state.shape))
    if codes.dtype == torch.int8:
        # A module that has run has taken the scales away from its parameter.
        scales = codes.SCB if codes.SCB is not None else module.state.SCB
        held = held * (scales.float().reshape(-1, 1) / 127)
    plain: torch.Tensor = held
    return plain


def _state(codes: Any, otherwise: Any) -> Any:
    """Return what 4 bits stand for."""
    found = getattr(codes, "quant_state", None)
    return otherwise if found is None else found


def _unpacked(data: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """Return codes in their own order where a CPU has put them into that of its instructions."""
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    # On a copy of the state, and without a second rounding of the scales, which lie transposed.
    plain = copy.copy(state)
    plain.original_nested = False
    codes, plain = _convert_weight_packed_for_cpu_inverse(data, plain)
    plain.absmax, plain.nested = state.absmax.T.reshape(-1).float(), False
    return codes, plain
