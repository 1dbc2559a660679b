"""AWQ as AutoAWQ's `gemm` stores it: words along the outputs, in an order of their own.

`qweight` int32 [K, N / 8], `qzeros` int32 [groups, N / 8], `scales` [groups, N]. The eight codes of
a word, lowest bits first, belong to its outputs 0, 2, 4, 6, 1, 3, 5, 7. A code q stands for
`scale * (q - zero)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from llm_coreml.checkpoint.matrix import Affine, signed, unpack
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts

# Where the code of each output of a word lies.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@final
@dataclass(frozen=True)
class AWQ(PackedFormat):
    """Codes of 4 bits in groups of `group_size` inputs, -1 for one group."""

    group_size: int

    label = "AWQ"
    suffixes = ("qweight", "qzeros", "scales")

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        columns, words = parts.shape("qweight")
        return words * 8, columns

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        groups = parts.groups(columns, self.group_size)
        scale = parts.numbers("scales", (groups, rows)).t().contiguous()
        zero = self._outputs(parts, "qzeros", groups, rows).to(torch.float64)
        return Affine(4, scale, -scale * (zero - 8))

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        return signed(self._outputs(parts, "qweight", columns, rows), 4).contiguous()

    def _outputs(self, parts: Parts, suffix: str, count: int, rows: int) -> torch.Tensor:
        """Return what a part holds for each output, uint8 `[rows, count]`."""
        words = parts.read(suffix, (count, rows // 8), (torch.int32,))
        by_word = unpack(words, 4).view(count, rows // 8, 8)
        return by_word[:, :, list(_PLACES)].view(count, rows).t()
