"""GPTQ as AutoGPTQ and GPTQModel store it: words along the inputs, zero points along the outputs.

`qweight` int32 [K * bits / 32, N], `qzeros` int32 [groups, N * bits / 32], `scales` [groups, N],
`g_idx` int32 [K], the group of each input. A code q stands for `scale * (q - zero)`. The first
version of the format stores `zero - 1`, so that a stored 15 means 16, beyond int4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from llm_coreml.checkpoint.matrix import Affine, signed, unpack
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts


@final
@dataclass(frozen=True)
class GPTQ(PackedFormat):
    """Codes of `bits` in groups of `group_size` inputs, -1 for one group.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale.
        bias: What is added to a stored zero point: 1 in version 1, 0 in version 2.
    """

    bits: int
    group_size: int
    bias: int

    label = "GPTQ"
    suffixes = ("qweight", "qzeros", "scales")
    optional = ("g_idx",)

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        words, rows = parts.shape("qweight")
        return rows, parts.codes_in("qweight", words, self.bits)

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        groups = parts.groups(columns, self.group_size)
        if rows * self.bits % 32:
            raise parts.error(f"the zero points of its {rows} outputs do not fill whole words")
        scale = parts.numbers("scales", (groups, rows)).t().contiguous()
        words = parts.read("qzeros", (groups, rows * self.bits // 32), (torch.int32,))
        zero = unpack(words, self.bits).t().to(torch.float64) + self.bias
        return Affine(self.bits, scale, -scale * (zero - 2 ** (self.bits - 1)))

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        words = parts.read("qweight", parts.shape("qweight"), (torch.int32,))
        codes = signed(unpack(words.t(), self.bits), self.bits)
        order = self.order(parts)
        return codes if order is None else codes[:, order]

    def order(self, parts: Parts) -> torch.Tensor | None:
        """See `PackedFormat`: inputs by their groups, which `desc_act` has anywhere."""
        if "g_idx" not in parts:
            return None
        _, columns = self.shape(parts)
        return parts.order("g_idx", columns, parts.groups(columns, self.group_size))
