"""Quantize one module's weight in place through torchao's `quantize_`.

    quantize_weight(decoder.layers[0].mlp.gate_proj, IntGroup(4, 32))

Scales and tables are rounded to fp16, the precision in which Core ML stores them, so that the
eager model is exactly the model that the artifact holds.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.quantization.codebook_coreml import CodebookWeightOnlyConfig
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from llm_coreml.quantize.schemes import Codebook, IntChannel, IntGroup, Scheme, Unquantized

# Weights quantized at a time: torchao holds several fp32 copies of what it is given. The rows of
# integer formats do not depend on each other.
_PIECE = 1 << 24


@singledispatch
def torchao_config(scheme: Scheme) -> AOBaseConfig | None:
    """Return the torchao config that makes `scheme`, or None where weights stay as they are."""
    raise NotImplementedError(f"no torchao config for {type(scheme).__name__}")


@torchao_config.register
def _(scheme: IntGroup) -> AOBaseConfig:
    return IntxWeightOnlyConfig(
        weight_dtype=_int_dtype(scheme.bits), granularity=PerGroup(scheme.group_size)
    )


@torchao_config.register
def _(scheme: IntChannel) -> AOBaseConfig:
    return IntxWeightOnlyConfig(weight_dtype=_int_dtype(scheme.bits), granularity=PerAxis(0))


@torchao_config.register
def _(scheme: Codebook) -> AOBaseConfig:
    dtype = getattr(torch, f"uint{scheme.bits}")
    return CodebookWeightOnlyConfig(dtype=dtype, block_size=[scheme.rows, -1])


@torchao_config.register
def _(scheme: Unquantized) -> None:
    return None


def quantize_weight(module: nn.Module, scheme: Scheme) -> None:
    """Replace `module.weight` (`[out, in]`, any float type) by its form quantized from fp32."""
    config = torchao_config(scheme)
    if config is None:
        return
    weight = module.get_parameter("weight").detach()
    rows = len(weight) if isinstance(scheme, Codebook) else max(1, _PIECE // weight.shape[1])
    quantized = _join([_quantized(piece, config) for piece in torch.split(weight, rows)])
    for name in ("scale", "codebook"):
        values = getattr(quantized, name, None)
        if values is not None:
            values.copy_(values.to(torch.float16).to(values.dtype))
    module.weight = nn.Parameter(quantized, requires_grad=False)


def _quantized(piece: torch.Tensor, config: AOBaseConfig) -> torch.Tensor:
    holder = nn.Linear(piece.shape[1], piece.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(piece.to(torch.float32), requires_grad=False)
    quantize_(holder, config)
    return holder.weight.detach()


def _join(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Return the quantized matrix whose rows are those of `pieces`, in order."""
    first: Any = pieces[0]
    if len(pieces) == 1:
        return pieces[0]
    data = [
        torch.cat([getattr(piece, name) for piece in pieces]) for name in first.tensor_data_names
    ]
    attributes = [getattr(first, name) for name in first.tensor_attribute_names]
    joined: torch.Tensor = type(first)(*data, *attributes)
    return joined


def _int_dtype(bits: int) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, f"int{bits}")
    return dtype
