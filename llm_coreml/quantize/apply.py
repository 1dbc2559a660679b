"""Quantize one module's weight in place through torchao's `quantize_`.

    quantize_weight(decoder.layers[0].mlp.gate_proj, IntGroup(4, 32))

Scales and tables are rounded to fp16, the precision in which Core ML stores them, so that the
eager model is exactly the model that the artifact holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from typing import Any

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.quantization.codebook_coreml import (
    CodebookQuantizedTensor,
    CodebookWeightOnlyConfig,
)
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.utils import TorchAOBaseTensor

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


def dense_rows(weight: torch.Tensor, elements: int = _PIECE) -> Iterator[torch.Tensor]:
    """Yield the values of `weight`, quantized or not, as fp32.

    Args:
        weight: Of any type, with at least one axis.
        elements: About how many to yield at a time.

    Yields:
        Consecutive rows.
    """
    count = len(weight)
    step = max(1, elements * count // max(1, weight.numel()))
    if isinstance(weight, CodebookQuantizedTensor):
        # A piece has whole tables.
        step = -(-step // _table_rows(weight)) * _table_rows(weight)
    for start in range(0, count, step):
        yield _rows(weight, start, min(start + step, count)).to(torch.float32)


def _table_rows(weight: CodebookQuantizedTensor) -> int:
    rows: int = weight.codes.shape[0] // weight.codebook.shape[0]
    return rows


def _rows(weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    dense: torch.Tensor
    if isinstance(weight, CodebookQuantizedTensor):
        tables = weight.codebook[start // _table_rows(weight) : stop // _table_rows(weight)]
        codes = weight.codes[start:stop]
        piece = type(weight)(
            codes, tables, weight.code_dtype, weight.block_size, codes.shape, weight.dtype
        )
        dense = piece.dequantize()
    elif isinstance(weight, TorchAOBaseTensor):
        dense = weight[start:stop].dequantize()
    else:
        dense = weight[start:stop]
    return dense.detach()


def _int_dtype(bits: int) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, f"int{bits}")
    return dtype
