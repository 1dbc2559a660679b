"""Quantize one module's weight in place, into a tensor type of torchao that lowers to Core ML.

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
from torchao.prototype.quantization.codebook_coreml import CodebookQuantizedTensor
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.utils import TorchAOBaseTensor

from llm_coreml.quantize.kmeans import kmeans
from llm_coreml.quantize.schemes import Codebook, IntChannel, IntGroup, Scheme, Unquantized

# Weights quantized at a time: torchao holds several fp32 copies of what it is given. The rows of
# integer formats do not depend on each other.
_PIECE = 1 << 24


def quantize_weight(module: nn.Module, scheme: Scheme) -> None:
    """Replace `module.weight` (`[out, in]`, any float type) by its quantized form.

    Raises:
        UnsupportedError: the format cannot hold a value.
    """
    weight = module.get_parameter("weight").detach()
    module.weight = nn.Parameter(quantized(scheme, weight), requires_grad=False)


@singledispatch
def quantized(scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` (`[out, in]`, any float type) as `scheme` stores it, made from fp32."""
    raise NotImplementedError(f"no quantizer for {type(scheme).__name__}")


@quantized.register
def _(scheme: IntGroup, weight: torch.Tensor) -> torch.Tensor:
    return _integers(weight, scheme.bits, PerGroup(scheme.group_size))


@quantized.register
def _(scheme: IntChannel, weight: torch.Tensor) -> torch.Tensor:
    return _integers(weight, scheme.bits, PerAxis(0))


@quantized.register
def _(scheme: Codebook, weight: torch.Tensor) -> torch.Tensor:
    tables, codes = kmeans(weight.reshape(-1, scheme.rows * weight.shape[1]), scheme.bits)
    found: torch.Tensor = CodebookQuantizedTensor(
        codes.view(weight.shape),
        tables.view(-1, 1, 2**scheme.bits, 1),
        getattr(torch, f"uint{scheme.bits}"),
        [scheme.rows, -1],
        weight.shape,
        dtype=torch.float32,
    )
    return found


@quantized.register
def _(scheme: Unquantized, weight: torch.Tensor) -> torch.Tensor:
    return weight


def _integers(weight: torch.Tensor, bits: int, granularity: Any) -> torch.Tensor:
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity
    )
    rows = max(1, _PIECE // weight.shape[1])
    joined: Any = _join([_by_torchao(piece, config) for piece in torch.split(weight, rows)])
    joined.scale.copy_(joined.scale.to(torch.float16).to(joined.scale.dtype))
    return torch.Tensor.detach(joined)


def _by_torchao(piece: torch.Tensor, config: AOBaseConfig) -> torch.Tensor:
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
