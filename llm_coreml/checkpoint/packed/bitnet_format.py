"""BitNet's ternary matrices: `weight` uint8 [N / 4, K], and one `weight_scale` for all of it.

A byte has two bits of four rows, N / 4 apart, the first in the lowest; a code q stands for
`weight_scale * (q - 1)`, or for `(q - 1) / weight_scale` in files of the older layer (`bitlinear`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from llm_coreml.checkpoint.matrix import Affine
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts

_PER_BYTE = 4


@final
@dataclass(frozen=True)
class BitNet(PackedFormat):
    """Codes -1, 0 and 1.

    Attributes:
        divides: Codes are divided by the scale, and not multiplied with it.
    """

    divides: bool

    label = "BitNet"
    suffixes = ("weight", "weight_scale")

    def holds(self, parts: Parts) -> bool:
        """See `PackedFormat`."""
        return parts.dtype("weight") == torch.uint8

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, columns = parts.shape("weight")
        return rows * _PER_BYTE, columns

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, _ = self.shape(parts)
        scale = parts.numbers("weight_scale", (1,))
        if self.divides and not bool(scale.all()):
            raise parts.error("weight_scale is 0, by which codes are divided")
        each = (1 / scale if self.divides else scale).expand(rows, 1).contiguous()
        if bool(((each != 0) & (each.to(torch.float16) == 0)).any()):
            raise parts.error(
                f"weight_scale makes all of it {float(each.max()):g}, which fp16 holds as 0"
            )
        return Affine(2, each, torch.zeros_like(each), ends=(-1, 1))

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        octets = parts.read("weight", parts.shape("weight"), (torch.uint8,))
        codes = torch.cat([octets >> 2 * place & 3 for place in range(_PER_BYTE)])
        if bool((codes == 3).any()):
            raise parts.error("weight has a code of 3, and codes are 0, 1 and 2")
        return codes.to(torch.int8) - 1
