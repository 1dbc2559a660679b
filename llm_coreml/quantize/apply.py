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

from llm_coreml.quantize.asymmetric import Integers, asymmetric
from llm_coreml.quantize.kmeans import kmeans
from llm_coreml.quantize.schemes import Codebook, IntChannel, IntGroup, Scheme, Unquantized
from llm_coreml.quantize.tensors import codebook_tensor, integer_tensor

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
    return _integers(weight, scheme, scheme.group_size, PerGroup(scheme.group_size))


@quantized.register
def _(scheme: IntChannel, weight: torch.Tensor) -> torch.Tensor:
    return _integers(weight, scheme, weight.shape[1], PerAxis(0))


@quantized.register
def _(scheme: Codebook, weight: torch.Tensor) -> torch.Tensor:
    row_groups, column_groups = scheme.tables((weight.shape[0], weight.shape[1]))
    blocks = weight.reshape(row_groups, -1, column_groups, weight.shape[1] // column_groups)
    blocks = blocks.transpose(1, 2)
    tables, codes = kmeans(blocks.reshape(row_groups * column_groups, -1), scheme.bits)
    codes = codes.view(blocks.shape).transpose(1, 2).reshape(weight.shape)
    return codebook_tensor(codes, tables.view(row_groups, column_groups, -1), scheme.bits)


@quantized.register
def _(scheme: Unquantized, weight: torch.Tensor) -> torch.Tensor:
    return weight


def _integers(
    weight: torch.Tensor, scheme: IntGroup | IntChannel, group_size: int, granularity: Any
) -> torch.Tensor:
    pieces = torch.split(weight, max(1, _PIECE // weight.shape[1]))
    if scheme.zero_point != "none":
        found = [asymmetric(p, scheme.bits, group_size, scheme.zero_point) for p in pieces]
        joined = Integers(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        return integer_tensor(*joined, scheme.bits)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.bits}"), granularity=granularity
    )
    made: list[Any] = [_by_torchao(piece, config) for piece in pieces]
    codes, scale = (torch.cat([getattr(p, n) for p in made]) for n in ("qdata", "scale"))
    return integer_tensor(codes, scale, None, scheme.bits)


def _by_torchao(piece: torch.Tensor, config: AOBaseConfig) -> torch.Tensor:
    holder = nn.Linear(piece.shape[1], piece.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(piece.to(torch.float32), requires_grad=False)
    quantize_(holder, config)
    return holder.weight.detach()


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
    for start in range(0, count, step):
        yield _rows(weight, start, min(start + step, count)).to(torch.float32)


def _rows(weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    dense: torch.Tensor
    if isinstance(weight, CodebookQuantizedTensor):
        dense = _look_up(weight, start, stop)
    elif isinstance(weight, TorchAOBaseTensor):
        dense = weight[start:stop].dequantize()
    else:
        dense = weight[start:stop]
    return dense.detach()


def _look_up(weight: CodebookQuantizedTensor, start: int, stop: int) -> torch.Tensor:
    """Return rows of a matrix whose tables need not end where a piece does."""
    row_groups, column_groups, entries, _ = weight.codebook.shape
    rows, columns = weight.codes.shape
    row_group = torch.arange(start, stop) // (rows // row_groups)
    column_group = torch.arange(columns) // (columns // column_groups)
    places = (row_group.unsqueeze(1) * column_groups + column_group) * entries
    dense: torch.Tensor = weight.codebook.flatten()[places + weight.codes[start:stop]]
    return dense
