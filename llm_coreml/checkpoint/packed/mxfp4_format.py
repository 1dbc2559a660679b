"""MXFP4 in safetensors: four-bit floats along the inputs, 32 to a power of two.

MLX: `weight` uint32 [N, K / 8], `scales` uint8 [N, K / 32]. compressed-tensors: `weight_packed`
uint8 [N, K / 2], `weight_scale` uint8 [N, K / 32]. A code is E2M1, a sign above two bits of
exponent and one of fraction, the first in the lowest bits; a scale is E8M0, `2^(s - 127)` (OCP
Microscaling Formats, version 1.0). Core ML looks the codes up among the values, doubled, which are
integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from llm_coreml.checkpoint.matrix import Affine, unpack
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts

# Twice what each code stands for.
ENTRIES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_GROUP = 32


def halved_scales(exponents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return half of each group's power of two, since entries are doubled.

    Args:
        exponents: uint8 `[rows, groups]`.
        codes: uint8 `[rows, groups * 32]`.

    Returns:
        fp64 `[rows, groups]`; zero for groups of zeros, whose exponent fp16 need not hold.
    """
    shifts = exponents.to(torch.int32) - 128
    scales = torch.ldexp(torch.ones_like(shifts, dtype=torch.float64), shifts)
    empty = (codes & 7 == 0).view(*scales.shape, -1).all(-1)
    return scales.masked_fill(empty, 0.0)


@final
@dataclass(frozen=True)
class Mxfp4Words(PackedFormat):
    """A matrix as one of the two tools writes it.

    Attributes:
        label: The tool and the format.
        suffixes: The parts: codes, and scales.
        dtype: Of the codes' words.
    """

    label: str
    suffixes: tuple[str, str]
    dtype: torch.dtype

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, words = parts.shape(self.suffixes[0])
        return rows, words * self.dtype.itemsize * 2

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        shape = (rows, parts.groups(columns, _GROUP))
        scale = halved_scales(parts.read(self.suffixes[1], shape, (torch.uint8,)), self._raw(parts))
        entries = torch.tensor(ENTRIES, dtype=torch.float64)
        return Affine(4, scale, torch.zeros_like(scale), (0, 15), entries)

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        return self._raw(parts).view(torch.int8)

    def _raw(self, parts: Parts) -> torch.Tensor:
        codes = self.suffixes[0]
        return unpack(parts.read(codes, parts.shape(codes), (self.dtype,)), 4)


MLX_MXFP4 = Mxfp4Words("MLX MXFP4", ("weight", "scales"), torch.uint32)
COMPRESSED_MXFP4 = Mxfp4Words(
    "compressed-tensors MXFP4", ("weight_packed", "weight_scale"), torch.uint8
)
