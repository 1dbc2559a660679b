"""GPTQ as AutoGPTQ and GPTQModel store it: words along the inputs, zero points along the outputs.

`qweight` int32 [K * bits / 32, N], `qzeros` int32 [groups, N * bits / 32], `scales` [groups, N],
`g_idx` int32 [K], the group of each input. A code q stands for `scale * (q - zero)`. The first
version of the format stores `zero - 1`, so that a stored 15 means 16, beyond int4. Where settings
differ between modules (GPTQModel's `dynamic`), the parts' own sizes tell them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from llm_coreml.checkpoint.matrix import Affine, signed, unpack
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts

BITS = (2, 3, 4, 8)


@final
@dataclass(frozen=True)
class GPTQ(PackedFormat):
    """Codes of `bits` in groups of `group_size` inputs, -1 for one group.

    Attributes:
        bits: 2, 3, 4 or 8; None is what the parts' sizes say.
        group_size: Inputs that share a scale; None is what the parts' sizes say.
        bias: What is added to a stored zero point: 1 in version 1, 0 in version 2.
    """

    bits: int | None
    group_size: int | None
    bias: int

    label = "GPTQ"
    suffixes = ("qweight", "qzeros", "scales")
    optional = ("g_idx",)

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        words, rows = parts.shape("qweight")
        return rows, parts.codes_in("qweight", words, self._bits(parts))

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        bits, groups = self._bits(parts), self._groups(parts, columns)
        if rows * bits % 32:
            raise parts.error(f"the zero points of its {rows} outputs do not fill whole words")
        scale = parts.numbers("scales", (groups, rows)).t().contiguous()
        words = parts.read("qzeros", (groups, rows * bits // 32), (torch.int32,))
        zero = unpack(words, bits).t().to(torch.float64) + self.bias
        return Affine(bits, scale, -scale * (zero - 2 ** (bits - 1)))

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        bits = self._bits(parts)
        words = parts.read("qweight", parts.shape("qweight"), (torch.int32,))
        codes = signed(unpack(words.t(), bits), bits)
        order = self.order(parts)
        return codes if order is None else codes[:, order]

    def order(self, parts: Parts) -> torch.Tensor | None:
        """See `PackedFormat`: inputs by their groups, which `desc_act` has anywhere."""
        if "g_idx" not in parts:
            return None
        _, columns = self.shape(parts)
        return parts.order("g_idx", columns, self._groups(parts, columns))

    def _bits(self, parts: Parts) -> int:
        if self.bits is not None:
            return self.bits
        rows, words = parts.shape("qweight")[1], parts.shape("qzeros")[1]
        for bits in BITS:
            if rows * bits == words * 32:
                return bits
        raise parts.error(
            f"qzeros has {words} words for {rows} outputs, which is none of "
            f"{', '.join(map(str, BITS))} bits for each"
        )

    def _groups(self, parts: Parts, columns: int) -> int:
        if self.group_size is not None:
            return parts.groups(columns, self.group_size)
        groups = parts.shape("scales")[0]
        if columns % groups:
            raise parts.error(f"its {columns} inputs do not divide into {groups} groups")
        return groups
