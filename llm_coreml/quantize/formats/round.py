"""Quantize one module's weight in place, into a tensor type that lowers to Core ML.

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

from llm_coreml.quantize.formats.integers import integers
from llm_coreml.quantize.formats.kmeans import kmeans
from llm_coreml.quantize.formats.lookup import LookupTensor, look_up
from llm_coreml.quantize.formats.mxfp4 import mxfp4
from llm_coreml.quantize.formats.schemes import (
    Codebook,
    IntChannel,
    IntGroup,
    Mxfp4,
    Scheme,
    Unquantized,
)
from llm_coreml.quantize.formats.tensors import (
    codebook_tensor,
    integer_tensor,
    lookup_tensor,
    mxfp4_tensor,
)
from llm_coreml.quantize.formats.vectors import kmeans_vectors

# Weights quantized at a time: torchao holds several fp32 copies of what it is given. The rows of
# integer formats do not depend on each other.
_PIECE = 1 << 24
# A search passes over its weights many times: they should fit a core's cache.
_SEARCHED = 1 << 19


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
    rows, columns = weight.shape
    row_groups, column_groups = scheme.tables((rows, columns))
    # [row_groups, rows of codes, vector, column_groups, columns]
    sizes = (row_groups, -1, scheme.vector, column_groups, columns // column_groups)

    def blocks(matrix: torch.Tensor) -> torch.Tensor:
        parts = matrix.reshape(sizes).permute(0, 3, 1, 4, 2)
        return parts.reshape(row_groups * column_groups, -1, scheme.vector)

    scale = None
    if scheme.vector > 1:
        tables, codes = kmeans_vectors(blocks(weight), scheme.bits)
    elif scheme.row_scale:
        scale = _row_scale(weight)
        counts = blocks(scale.square().expand_as(weight)).squeeze(2)
        values = blocks(weight.to(torch.float32) / scale).squeeze(2)
        tables, codes = kmeans(values, scheme.bits, counts)
    else:
        tables, codes = kmeans(blocks(weight).squeeze(2), scheme.bits)
    codes = codes.view(row_groups, column_groups, -1, columns // column_groups)
    codes = codes.transpose(1, 2).reshape(rows // scheme.vector, columns)
    tables = tables.view(row_groups, column_groups, -1, scheme.vector)
    if scale is None and scheme.vector == 1:
        return codebook_tensor(codes, tables.squeeze(3), scheme.bits)
    return lookup_tensor(codes, tables, scheme.bits, scale, None)


def _row_scale(weight: torch.Tensor) -> torch.Tensor:
    """Return what brings every row to about one, `[rows, 1]`, as fp16 numbers."""
    scale = weight.to(torch.float32).square().mean(1, keepdim=True).sqrt()
    smallest = torch.finfo(torch.float16).smallest_normal
    return scale.clamp(min=smallest).to(torch.float16).to(torch.float32)


@quantized.register
def _(scheme: Mxfp4, weight: torch.Tensor) -> torch.Tensor:
    found = [mxfp4(piece) for piece in _pieces(weight, _PIECE)]
    codes, exponents = (torch.cat(parts) for parts in zip(*found, strict=True))
    return mxfp4_tensor(codes, exponents)


@quantized.register
def _(scheme: Unquantized, weight: torch.Tensor) -> torch.Tensor:
    return weight


def _integers(
    weight: torch.Tensor, scheme: IntGroup | IntChannel, group_size: int, granularity: Any
) -> torch.Tensor:
    # torchao does not take a weight for a group.
    if scheme.zero_point != "none" or scheme.bits < 8 or group_size == 1:
        pieces = _pieces(weight, _SEARCHED)
        found = (integers(piece, scheme.bits, group_size, scheme.zero_point) for piece in pieces)
        all_codes, scales, zeros = zip(*found, strict=True)
        zero_point = None if scheme.zero_point == "none" else torch.cat(zeros)
        return integer_tensor(torch.cat(all_codes), torch.cat(scales), zero_point, scheme.bits)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.bits}"), granularity=granularity
    )
    # With so many steps a search for a better scale finds next to nothing.
    made: list[Any] = [_by_torchao(piece, config) for piece in _pieces(weight, _PIECE)]
    codes, scale = (torch.cat([getattr(p, n) for p in made]) for n in ("qdata", "scale"))
    return integer_tensor(codes, scale, None, scheme.bits)


def _pieces(weight: torch.Tensor, elements: int) -> tuple[torch.Tensor, ...]:
    return torch.split(weight, max(1, elements // weight.shape[1]))


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


def one_row(weight: torch.Tensor, row: int) -> torch.Tensor:
    """Return a row of `weight`, see `dense_rows`, `[1, ...]`."""
    return _rows(weight, row, row + 1).to(torch.float32)


def _rows(weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    dense: torch.Tensor
    if isinstance(weight, CodebookQuantizedTensor):
        dense = look_up(weight.codes, weight.codebook, start, stop)
    elif isinstance(weight, LookupTensor):
        dense = weight.rows(start, stop)
    elif isinstance(weight, TorchAOBaseTensor):
        dense = weight[start:stop].dequantize()
    else:
        dense = weight[start:stop]
    return dense.detach()
