"""compressed-tensors, as LLM Compressor writes it: packed along the inputs, or int8 as it is.

Packed: `weight_packed` int32 [N, K * bits / 32], `weight_shape` [2], `weight_scale` [N, groups] and
for asymmetric ones `weight_zero_point` int32 [N * bits / 32, groups], packed along the outputs;
codes and zero points have 2^(bits - 1) added. Up to version 0.9.3 zero points were plain int8
[N, groups]. Plain: `weight` int8 [N, K], `weight_scale`, and `weight_zero_point` int8. A code q
stands for `scale * (q - zero)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from llm_coreml.checkpoint.matrix import Affine, signed, unpack
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts


@dataclass(frozen=True)
class _Compressed(PackedFormat):
    """What both layouts share.

    Attributes:
        group_sizes: Those that config.json names.
    """

    group_sizes: frozenset[int]

    label = "compressed-tensors"
    optional = ("weight_zero_point", "weight_g_idx")
    beside = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")

    def order(self, parts: Parts) -> torch.Tensor | None:
        """See `PackedFormat`: inputs by their groups, which `actorder=group` has anywhere."""
        if "weight_g_idx" not in parts:
            return None
        _, columns = self.shape(parts)
        return parts.order("weight_g_idx", columns, parts.shape("weight_scale")[1])

    def _sorted(self, parts: Parts, codes: torch.Tensor) -> torch.Tensor:
        order = self.order(parts)
        return codes if order is None else codes[:, order]

    def _scale(self, parts: Parts, rows: int, columns: int) -> torch.Tensor:
        if parts.checkpoint.shape(f"{parts.module}.weight_scale") == (1,):
            return parts.numbers("weight_scale", (1,)).expand(rows, 1)
        groups = parts.shape("weight_scale")[1]
        if groups != 1 and not (columns % groups == 0 and columns // groups in self.group_sizes):
            raise parts.error(
                f"weight_scale has {groups} groups for {columns} inputs, which is no group size of "
                "config.json"
            )
        return parts.numbers("weight_scale", (rows, groups))


@final
@dataclass(frozen=True)
class PackedWords(_Compressed):
    """Codes of 4 or 8 bits in words."""

    suffixes = ("weight_packed", "weight_scale", "weight_shape")

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, columns = parts.read("weight_shape", (2,), (torch.int64, torch.int32)).tolist()
        packed, words = parts.shape("weight_packed")
        if packed != rows or (words * 32) not in (columns * 4, columns * 8):
            raise parts.error(
                f"weight_packed is {[packed, words]} for a matrix {[rows, columns]}, which is "
                "neither 4 nor 8 bits per weight"
            )
        return rows, columns

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        bits = self._bits(parts)
        scale = self._scale(parts, rows, columns)
        if "weight_zero_point" not in parts:
            return Affine(bits, scale, torch.zeros_like(scale))
        if parts.dtype("weight_zero_point") == torch.int8:
            plain = parts.read("weight_zero_point", tuple(scale.shape), (torch.int8,))
            return Affine(bits, scale, -scale * plain.to(torch.float64))
        words = (-(-rows * bits // 32), scale.shape[1])
        packed = parts.read("weight_zero_point", words, (torch.int32,))
        zero = unpack(packed.t(), bits)[:, :rows].t().to(torch.float64)
        return Affine(bits, scale, -scale * (zero - 2 ** (bits - 1)))

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        words = parts.read("weight_packed", parts.shape("weight_packed"), (torch.int32,))
        return self._sorted(parts, signed(unpack(words, self._bits(parts)), self._bits(parts)))

    def _bits(self, parts: Parts) -> int:
        return parts.shape("weight_packed")[1] * 32 // self.shape(parts)[1]


@final
@dataclass(frozen=True)
class PlainBytes(_Compressed):
    """Codes of 8 bits as int8."""

    suffixes = ("weight", "weight_scale")

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, columns = parts.shape("weight")
        return rows, columns

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        scale = self._scale(parts, *self.shape(parts))
        if "weight_zero_point" not in parts:
            return Affine(8, scale, torch.zeros_like(scale))
        shape = parts.checkpoint.shape(f"{parts.module}.weight_scale")
        zero = parts.read("weight_zero_point", shape, (torch.int8,)).to(torch.float64)
        return Affine(8, scale, -scale * zero)

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        return self._sorted(parts, parts.read("weight", self.shape(parts), (torch.int8,)))
