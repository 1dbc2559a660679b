"""MLX's affine format: words along the inputs, a scale and a bias for each group.

`weight` uint32 [N, K * bits / 32], `scales` and `biases` [N, groups], in the model's type. A code
q stands for `scale * q + bias`, and the scale may be below zero. Core ML subtracts a zero point
before it scales, and `-bias / scale` is rarely an fp16 number: most of these imports are inexact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch

from llm_coreml.checkpoint.matrix import Affine, signed, unpack
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts


@final
@dataclass(frozen=True)
class MLX(PackedFormat):
    """Codes of `bits` in groups of `group_size` inputs.

    Attributes:
        bits: 2, 3, 4, 6 or 8.
        group_size: Inputs that share a scale.
        others: Bits and group size of modules that have their own.
    """

    bits: int
    group_size: int
    others: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    label = "MLX"
    suffixes = ("weight", "scales", "biases")

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, words = parts.shape("weight")
        return rows, parts.codes_in("weight", words, self._settings(parts)[0])

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        bits, size = self._settings(parts)
        rows, columns = self.shape(parts)
        shape = (rows, parts.groups(columns, size))
        scale = parts.numbers("scales", shape)
        return Affine(bits, scale, parts.numbers("biases", shape) + scale * 2 ** (bits - 1))

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        bits, _ = self._settings(parts)
        words = parts.read("weight", parts.shape("weight"), (torch.uint32,))
        return signed(unpack(words, bits), bits)

    def _settings(self, parts: Parts) -> tuple[int, int]:
        return self.others.get(parts.module, (self.bits, self.group_size))
