"""The weight type for what torchao's tensors cannot say: any table that Core ML can look up.

    LookupTensor(codes, tables, bits=3, scale=scale)       # scale * tables[block, codes]

Tables for blocks of rows and columns, entries that are vectors, and scales and zero points on top
of a table, which is how codes of 2, 3 and 6 bits and floats of 4 bits are held. In an exported
graph the weight is the custom op `llm_coreml::expand_codebook`, which the Core ML lowering turns
into `constexpr_lut_to_dense`, with `constexpr_blockwise_shift_scale` on it if there are scales.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torchao.utils import TorchAOBaseTensor


def look_up(codes: torch.Tensor, tables: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return rows [start, stop) of the matrix that `codes` name; see `expand_codebook`."""
    row_groups, column_groups, entries, width = tables.shape
    rows, columns = codes.shape[0] * width, codes.shape[1]
    kind = torch.int32 if tables.numel() < 1 << 31 else torch.int64
    row = torch.arange(start, stop, dtype=kind, device=codes.device)
    column = torch.arange(columns, dtype=kind, device=codes.device)
    block = (row // (rows // row_groups)).unsqueeze(1) * column_groups
    block = block + column // (columns // column_groups)
    entry = block * entries + codes[row // width]
    return tables.flatten()[entry * width + (row % width).unsqueeze(1)]


def expand_rows(
    codes: torch.Tensor,
    tables: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Return rows [start, stop) of what `expand_codebook` returns."""
    values = look_up(codes, tables, start, stop).to(torch.float32)
    if scale is None:
        return values
    rows, columns = codes.shape[0] * tables.shape[3], codes.shape[1]
    block = torch.arange(start, stop, device=codes.device) // (rows // scale.shape[0])
    grouped = values.view(stop - start, scale.shape[1], columns // scale.shape[1])
    if zero_point is not None:
        grouped -= zero_point[block].unsqueeze(2)
    grouped *= scale[block].unsqueeze(2)
    return values


@torch.library.custom_op("llm_coreml::expand_codebook", mutates_args=())
def expand_codebook(
    codes: torch.Tensor,
    tables: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """Return the matrix `scale * (tables[block, codes] - zero_point)`, fp32 `[rows, columns]`.

    Args:
        codes: uint8 `[rows / width, columns]`, below `2**bits`.
        tables: int8 or fp32 `[row_groups, column_groups, 2**bits, width]`; an entry lies along
            `width` consecutive rows.
        scale: fp32 `[row_blocks, column_blocks]`; None is one.
        zero_point: int8 or fp32, as `scale`, which comes with it; None is zero.
        bits: 1, 2, 3, 4, 6 or 8.
    """
    return expand_rows(codes, tables, scale, zero_point, 0, codes.shape[0] * tables.shape[3])


@expand_codebook.register_fake
def _(
    codes: torch.Tensor,
    tables: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    shape = (codes.shape[0] * tables.shape[3], codes.shape[1])
    return codes.new_empty(shape, dtype=torch.float32)


class LookupTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """A weight matrix for linear layers and token tables; arguments are `expand_codebook`'s."""

    # Lists, since torchao copies them.
    tensor_data_names: ClassVar = ["codes", "tables"]
    tensor_attribute_names: ClassVar = ["bits"]
    optional_tensor_data_names: ClassVar = ["scale", "zero_point"]

    codes: torch.Tensor
    tables: torch.Tensor
    bits: int
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None

    def __new__(
        cls,
        codes: torch.Tensor,
        tables: torch.Tensor,
        bits: int,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
    ) -> LookupTensor:
        """Wrap the parts; nothing is copied."""
        shape = (codes.shape[0] * tables.shape[3], codes.shape[1])
        made: LookupTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, device=codes.device, requires_grad=False
        )
        return made

    def __init__(
        self,
        codes: torch.Tensor,
        tables: torch.Tensor,
        bits: int,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.codes = codes
        self.tables = tables
        self.bits = bits
        self.scale = scale
        self.zero_point = zero_point

    def dequantize(self) -> torch.Tensor:
        """Return the values, fp32."""
        parts = (self.codes, self.tables, self.scale, self.zero_point, self.bits)
        dense: torch.Tensor = expand_codebook(*parts)
        return dense

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the values, fp32."""
        return expand_rows(self.codes, self.tables, self.scale, self.zero_point, start, stop)


@LookupTensor.implements_torch_function(torch.nn.functional.linear)  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    x, weight, *bias = args
    return func(x, weight.dequantize(), *bias, **kwargs)


@LookupTensor.implements_torch_function(torch.nn.functional.embedding)  # type: ignore[untyped-decorator]
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    tokens, weight, *rest = args
    return func(tokens, weight.dequantize(), *rest, **kwargs)
