"""The block formats of GGUF: rows of blocks, each with its scales beside its codes.

A block of 32 codes has one fp16 scale `d`, and a minimum `m` in the formats `_1`. A block of 256 in
the formats `_K` has 6 bit scales, and minimums, of its parts, which fp16 numbers `d` and `dmin`
scale in turn; their products have more digits than fp16, so these imports are inexact. IQ4_NL,
IQ4_XS and MXFP4 have tables of their own. Types whose codes stand for several weights at once, and
others that Core ML cannot hold, are read as values only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from llm_coreml.checkpoint.matrix import Affine
from llm_coreml.checkpoint.packed.mxfp4_format import ENTRIES, halved_scales
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts, ValueFormat


@dataclass(frozen=True)
class BlockType(PackedFormat):
    """A type of GGUF's whose rows are blocks.

    Attributes:
        name: Of the type, which is also that of the only part.
        elements: Weights of a block.
        size: Bytes of a block.
    """

    name: str
    elements: int
    size: int

    @property
    def label(self) -> str:  # type: ignore[override]
        """Return the name of the type, as people call it."""
        return f"GGUF {self.name}"

    @property
    def suffixes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the only part."""
        return (self.name,)

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, octets = parts.shape(self.name)
        return rows, octets // self.size * self.elements

    def _octets(self, parts: Parts) -> torch.Tensor:
        return parts.read(self.name, parts.shape(self.name), (torch.uint8,))


@final
@dataclass(frozen=True)
class Blocks(BlockType):
    """A type whose blocks have scales and a code for each weight, uint8 `[count, size]`.

    Attributes:
        bits: Of the codes as they are held, 2, 3, 4, 6 or 8.
        ends: The lowest and the highest of them.
        read_scales: Returns fp64 scales and offsets, `[count, groups of a block]`.
        read_codes: Returns signed codes, int8 `[count, elements]`, or places of `entries`.
        entries: What stands in the place of codes; None is the codes themselves.
    """

    bits: int
    ends: tuple[int, int]
    read_scales: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    read_codes: Callable[[torch.Tensor], torch.Tensor]
    entries: tuple[int, ...] | None = None

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, _ = self.shape(parts)
        scale, offset = self.read_scales(self._blocks(parts))
        entries = None
        if self.entries is not None:
            entries = torch.tensor(self.entries, dtype=torch.float64)
        scale, offset = scale.reshape(rows, -1), offset.reshape(rows, -1)
        return Affine(self.bits, scale, offset, self.ends, entries)

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        return self.read_codes(self._blocks(parts)).reshape(self.shape(parts))

    def _blocks(self, parts: Parts) -> torch.Tensor:
        return self._octets(parts).reshape(-1, self.size)


@final
@dataclass(frozen=True)
class ValueBlocks(BlockType, ValueFormat):
    """A type of which only the values are read, by llama.cpp's own package.

    Attributes:
        number: That files give the type.
    """

    number: int

    def values(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        import gguf

        octets = self._octets(parts).numpy()
        with np.errstate(all="ignore"):  # what is not finite is told when it is read
            found = gguf.dequantize(octets, gguf.GGMLQuantizationType(self.number))
        return torch.from_numpy(found)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the fp16 number at a place of each block, fp64 `[count, 1]`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float64)


def _nibbles(octets: torch.Tensor, run: int) -> torch.Tensor:
    """Return the low four bits of each `run` bytes, then the high four, uint8."""
    runs = octets.reshape(len(octets), -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], dim=2).flatten(1)


def _symmetric(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _half(blocks, 0)
    return scale, torch.zeros_like(scale)


def _with_minimum(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _half(blocks, 0)
    return scale, _half(blocks, 2) + 8 * scale


def _k_scales(blocks: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and offsets of eight parts of 32; codes are those stored less `shift`.

    Twelve bytes hold eight scales and eight minimums of 6 bits: the first four of each in the low
    bits of bytes 0 to 3 and 4 to 7, the others as low half bytes of 8 to 11 and, above these, the
    two high bits of the first eight bytes.
    """
    first, second, third = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1)
    minimums = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1)
    scale = _half(blocks, 0) * scales
    return scale, shift * scale - _half(blocks, 2) * minimums


def _q5_k_codes(blocks: torch.Tensor) -> torch.Tensor:
    high = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(1, 8, 1) & 1
    return (_nibbles(blocks[:, 48:], 32) | high.flatten(1) << 4).view(torch.int8)


def _high_bits(octets: torch.Tensor) -> torch.Tensor:
    """Return bit by bit what four bytes hold for 32 weights, uint8 `[count, 32]`."""
    bits = octets.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1)


def _q5_codes(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return codes of 5 bits from 0 on, uint8: four bytes of high bits, then half bytes."""
    high = _high_bits(blocks[:, start : start + 4])
    return _nibbles(blocks[:, start + 4 :], 16) | high << 4


def _pairs(octets: torch.Tensor) -> torch.Tensor:
    """Return codes of 2 bits, the lowest of 32 bytes first, then the next, uint8."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    return (octets.reshape(len(octets), -1, 1, 32) >> shifts & 3).flatten(1)


def _q2_k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _half(blocks, 80) * (blocks[:, :16] & 15)
    return scale, 2 * scale - _half(blocks, 82) * (blocks[:, :16] >> 4)


def _q3_k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales of sixteen parts, 6 bits each, less 32.

    The low half bytes of eight bytes, then the high ones; their two high bits are in four bytes
    more, the lowest pair of each first.
    """
    low = torch.cat([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4], dim=1)
    high = torch.cat([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
    scale = _half(blocks, 108) * ((low | high << 4).view(torch.int8) - 32)
    return scale, torch.zeros_like(scale)


def _q3_k_codes(blocks: torch.Tensor) -> torch.Tensor:
    high = blocks[:, None, :32] >> torch.arange(8, dtype=torch.uint8).view(1, 8, 1) & 1
    return ((_pairs(blocks[:, 32:96]) | high.flatten(1) << 2) - 4).view(torch.int8)


def _iq4_xs_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=2).flatten(1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    high = (blocks[:, 2:4].unsqueeze(2) >> shifts & 3).flatten(1)
    scale = _half(blocks, 0) * ((low | high << 4).view(torch.int8) - 32)
    return scale, torch.zeros_like(scale)


def _q6_k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    return scale, torch.zeros_like(scale)


def _q6_k_codes(blocks: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    return ((_nibbles(blocks[:, :128], 64) | high.flatten(1) << 4) - 32).view(torch.int8)


def _mxfp4_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = halved_scales(blocks[:, :1], _nibbles(blocks[:, 1:], 16))
    return scale, torch.zeros_like(scale)


Q4_0 = Blocks(
    "Q4_0", 32, 18, 4, (-8, 7), _symmetric, lambda b: (_nibbles(b[:, 2:], 16) - 8).view(torch.int8)
)
Q4_1 = Blocks(
    "Q4_1",
    32,
    20,
    4,
    (-8, 7),
    _with_minimum,
    lambda b: (_nibbles(b[:, 4:], 16) - 8).view(torch.int8),
)
Q5_0 = Blocks(
    "Q5_0", 32, 22, 6, (-16, 15), _symmetric, lambda b: (_q5_codes(b, 2) - 16).view(torch.int8)
)
Q5_1 = Blocks(
    "Q5_1",
    32,
    24,
    6,
    (0, 31),
    lambda b: (_half(b, 0), _half(b, 2)),
    lambda b: _q5_codes(b, 4).view(torch.int8),
)
Q8_0 = Blocks(
    "Q8_0", 32, 34, 8, (-128, 127), _symmetric, lambda b: b[:, 2:].contiguous().view(torch.int8)
)
Q2_K = Blocks(
    "Q2_K",
    256,
    84,
    2,
    (-2, 1),
    _q2_k_scales,
    lambda b: (_pairs(b[:, 16:80]) - 2).view(torch.int8),
)
Q3_K = Blocks("Q3_K", 256, 110, 3, (-4, 3), _q3_k_scales, _q3_k_codes)
Q4_K = Blocks(
    "Q4_K",
    256,
    144,
    4,
    (-8, 7),
    lambda b: _k_scales(b, 8),
    lambda b: (_nibbles(b[:, 16:], 32) - 8).view(torch.int8),
)
Q5_K = Blocks("Q5_K", 256, 176, 6, (0, 31), lambda b: _k_scales(b, 0), _q5_k_codes)
Q6_K = Blocks("Q6_K", 256, 210, 6, (-32, 31), _q6_k_scales, _q6_k_codes)

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_NL = Blocks(
    "IQ4_NL",
    32,
    18,
    4,
    (0, 15),
    _symmetric,
    lambda b: _nibbles(b[:, 2:], 16).view(torch.int8),
    _IQ4_VALUES,
)
IQ4_XS = Blocks(
    "IQ4_XS",
    256,
    136,
    4,
    (0, 15),
    _iq4_xs_scales,
    lambda b: _nibbles(b[:, 8:], 16).view(torch.int8),
    _IQ4_VALUES,
)
MXFP4 = Blocks(
    "MXFP4",
    32,
    17,
    4,
    (0, 15),
    _mxfp4_scales,
    lambda b: _nibbles(b[:, 1:], 16).view(torch.int8),
    ENTRIES,
)

_VALUES = (
    ValueBlocks("IQ2_XXS", 256, 66, 16),
    ValueBlocks("IQ2_XS", 256, 74, 17),
    ValueBlocks("IQ3_XXS", 256, 98, 18),
    ValueBlocks("IQ1_S", 256, 50, 19),
    ValueBlocks("IQ3_S", 256, 110, 21),
    ValueBlocks("IQ2_S", 256, 82, 22),
    ValueBlocks("IQ1_M", 256, 56, 29),
    ValueBlocks("TQ1_0", 256, 54, 34),
    ValueBlocks("TQ2_0", 256, 66, 35),
)

# The numbers that files give their types.
BLOCKS: dict[int, BlockType] = {
    2: Q4_0,
    3: Q4_1,
    6: Q5_0,
    7: Q5_1,
    8: Q8_0,
    10: Q2_K,
    11: Q3_K,
    12: Q4_K,
    13: Q5_K,
    14: Q6_K,
    20: IQ4_NL,
    23: IQ4_XS,
    39: MXFP4,
    **{form.number: form for form in _VALUES},
}
