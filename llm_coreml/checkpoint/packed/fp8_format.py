"""Floats of 8 bits: `weight` float8 [N, K] and a scale for all, for each row or for each block.

A number stands for `scale * number`; `weight_scale_inv` is what it is multiplied by, too. Core ML
has no such floats, so that only values are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from llm_coreml.checkpoint.packed.parts import Parts, ValueFormat

_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


@final
@dataclass(frozen=True)
class FP8(ValueFormat):
    """Floats of 8 bits.

    Attributes:
        scale: The name of the scales.
        block: Rows and columns that share one, where there are several along both.
    """

    scale: str
    block: tuple[int, int]

    label = "FP8"
    beside = ("input_scale", "output_scale", "input_scale_ub")

    @property
    def suffixes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the parts that every matrix has."""
        return ("weight", self.scale)

    def holds(self, parts: Parts) -> bool:
        """See `PackedFormat`."""
        return parts.dtype("weight") in _FLOATS

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, columns = parts.shape("weight")
        return rows, columns

    def values(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        stored = parts.read("weight", (rows, columns), _FLOATS).to(torch.float32)
        found = parts.checkpoint.shape(f"{parts.module}.{self.scale}")
        scale = parts.numbers(self.scale, found).to(torch.float32)
        if scale.numel() == 1:
            return stored * scale.reshape(())
        if found in ((rows,), (rows, 1)):
            return stored * scale.reshape(rows, 1)
        tall, wide = self.block
        if found != (-(-rows // tall), -(-columns // wide)):
            raise parts.error(
                f"{self.scale} is {list(found)} for a matrix {[rows, columns]}, which is no scale "
                f"for all, for each row or for each block of {tall} x {wide}"
            )
        repeated = scale.repeat_interleave(tall, dim=0)[:rows]
        return stored * repeated.repeat_interleave(wide, dim=1)[:, :columns]
