"""torchao's IntxUnpackedToInt8Tensor in safetensors: a byte for each code.

`_weight_qdata` int8 [N, K], `_weight_scale` and `_weight_zero_point` [N, groups], the latter int8
or floating-point. A code q stands for `scale * (q - zero)`. How many bits they take, the codes
themselves say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from llm_coreml.checkpoint.checkpoint import WEIGHT_DTYPES
from llm_coreml.checkpoint.matrix import Affine
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts

# What a matrix may be held in, see `Levels`.
_BITS = (2, 3, 4, 6, 8)


@final
@dataclass(frozen=True)
class TorchAO(PackedFormat):
    """Codes of 1 to 8 bits."""

    label = "torchao"
    suffixes = ("_weight_qdata", "_weight_scale", "_weight_zero_point")

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, columns = parts.shape("_weight_qdata")
        return rows, columns

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        groups = parts.shape("_weight_scale")[1]
        if columns % groups:
            raise parts.error(f"its {columns} inputs do not divide into {groups} groups")
        scale = parts.numbers("_weight_scale", (rows, groups))
        whole = (torch.int8, *WEIGHT_DTYPES)
        zero = parts.read("_weight_zero_point", (rows, groups), whole).to(torch.float64)
        low, high = torch.aminmax(self.codes(parts))
        ends = (int(low), int(high))
        bits = 4 if ends[0] >= -8 and ends[1] < 8 else 8
        return Affine(bits, scale, -scale * zero, ends)

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        return parts.read("_weight_qdata", self.shape(parts), (torch.int8,))
