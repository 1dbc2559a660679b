"""A quantized matrix as numbers: codes, and what each code stands for in each group of inputs.

Every format here says `scale * code + offset`, or `scale * entries[code]`, in a way of its own.
Core ML says `scale * (code - zero_point)`, or the same of a table, with fp16 numbers and signed
codes. So an import is exact if these give the very same values, and its error is measured where
they do not.

    levels = fit(Affine(4, scale, offset))  # levels.error == 0.0 is exact
    unpack(words, 4)                        # eight codes out of each int32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch

ZeroPoint = Literal["none", "int", "float"]

# Elements whose values are computed at a time.
_PIECE = 1 << 22


@final
@dataclass(frozen=True)
class Affine:
    """What the signed codes of one matrix stand for by its format: `scale * code + offset`.

    Attributes:
        bits: 2, 3, 4, 6 or 8, or 1 with `entries`.
        scale: fp64 `[rows, groups]`, any sign; consecutive inputs share one.
        offset: fp64 `[rows, groups]`.
        ends: The lowest and the highest code; None is all that `bits` hold.
        entries: fp64 `[2**bits]`, what stands in the place of codes, which count from 0 then and
            have no offset; None is the codes themselves. Of `[row_groups, column_groups, 2**bits]`
            each block of rows and columns has its own, and `scale` is one, `[rows, 1]`.
    """

    bits: int
    scale: torch.Tensor
    offset: torch.Tensor
    ends: tuple[int, int] | None = None
    entries: torch.Tensor | None = None


@final
@dataclass(frozen=True)
class Levels:
    """What the codes of one matrix stand for: `scale * (code - zero_point)`.

    Attributes:
        bits: 2, 3, 4, 6 or 8, or 1 with `entries`.
        scale: fp32 `[rows, groups]`, fp16 numbers; consecutive inputs share one.
        zero_point: int8, or fp32 that are fp16 numbers, `[rows, groups]`; None is zero everywhere.
        flat: bool `[rows, groups]`: groups of one value only, whose codes are all taken as 0.
        error: Largest |stored - defined| over the range of codes, as a share of the distance
            between two codes; 0 if both are the same numbers.
        entries: fp32 `[2**bits]`, fp16 numbers, what stands in the place of codes; None is the
            codes themselves. Of blocks as `Affine` has them.
    """

    bits: int
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    flat: torch.Tensor
    error: float
    entries: torch.Tensor | None = None

    @property
    def kind(self) -> ZeroPoint:
        """Return which numbers the zero points are."""
        if self.zero_point is None:
            return "none"
        return "float" if self.zero_point.is_floating_point() else "int"

    @property
    def tables(self) -> torch.Tensor | None:
        """Return the entries of blocks, None where there are none, or one table for all."""
        return self.entries if self.entries is not None and self.entries.dim() == 3 else None


@final
@dataclass(frozen=True)
class Packed:
    """A quantized matrix `[rows, columns]`.

    Attributes:
        codes: int8 `[rows, columns]`, from `-2**(bits - 1)` to `2**(bits - 1) - 1`, or places of
            entries.
        levels: What they stand for.
        order: int64 `[columns]`, which input each column belongs to; None is its own.
    """

    codes: torch.Tensor
    levels: Levels
    order: torch.Tensor | None = None


@final
@dataclass(frozen=True)
class PackedForm:
    """How a checkpoint stores one matrix that is quantized already.

    Attributes:
        label: The format, as people call it.
        bits: Of one code.
        group_size: Inputs that share a scale; None where a row has only one.
        zero_point: Which numbers its zero points are.
        error: Largest difference that storing it for Core ML makes, see `Levels.error`; 0 is exact.
        table: Its codes are places in a table.
        block: Rows and inputs that share a table, None being all of them, where blocks have tables
            of their own.
    """

    label: str
    bits: int
    group_size: int | None
    zero_point: ZeroPoint
    error: float
    table: bool = False
    block: tuple[int | None, int | None] | None = None


def fit(affine: Affine) -> Levels:
    """Find the fp16 numbers nearest to what a format defines.

    Raises:
        ValueError: a number is not finite, or fp16 cannot hold it.
    """
    if affine.entries is not None and affine.entries.dim() == 3:
        return _fit_tables(affine, affine.entries)
    if affine.entries is not None:
        return _fit_table(affine, affine.entries)
    bits, scale, offset = affine.bits, affine.scale, affine.offset
    half = 2 ** (bits - 1)
    # Values of a group without a scale are all `offset`: once a scale, with a zero point of -1.
    flat = (scale == 0) & (offset != 0)
    slope = torch.where(flat, offset, scale)
    stored = _halves(slope, "scale")
    zero = torch.where((stored == 0) & offset.isfinite(), 0.0, -offset / stored)
    whole = bool((zero == zero.round()).all() and (zero >= -half).all() and (zero < half).all())
    if not whole:
        zero = _halves(zero, "zero point")
    error = 0.0
    for end in affine.ends or (-half, half - 1):
        code = torch.where(flat, 0, end)
        off = (stored * (code - zero) - (slope * code + offset)).abs()
        error = max(error, float(torch.where(off == 0, 0.0, off / slope.abs()).max()))
    point = zero.to(torch.int8 if whole else torch.float32)
    return Levels(
        bits, stored.to(torch.float32), point if bool((zero != 0).any()) else None, flat, error
    )


def _fit_table(affine: Affine, entries: torch.Tensor) -> Levels:
    """Find the fp16 numbers nearest to `scale * entries[code]`."""
    scale, held = _halves(affine.scale, "scale"), _halves(entries, "table's value")
    gaps = torch.diff(entries.sort().values)
    if not bool((gaps > 0).any()):
        raise ValueError("its table has one value only")
    gap = gaps[gaps > 0].min()
    error = 0.0
    for entry, value in zip(entries.tolist(), held.tolist(), strict=True):
        off = (scale * value - affine.scale * entry).abs()
        share = torch.where(off == 0, 0.0, off / (affine.scale.abs() * gap))
        error = max(error, float(share.max()))
    flat = torch.zeros_like(scale, dtype=torch.bool)
    fp32 = torch.float32
    return Levels(affine.bits, scale.to(fp32), None, flat, error, held.to(fp32))


def _fit_tables(affine: Affine, entries: torch.Tensor) -> Levels:
    """Find the fp16 numbers nearest to the tables of blocks."""
    held = _halves(entries, "table's value")
    gaps = entries.diff(dim=2)
    gap = torch.where(gaps > 0, gaps, torch.inf).amin(2, keepdim=True)
    off = (held - entries).abs()
    # Of a table with one value there is no distance: it is off by itself.
    gap = torch.where(gap.isinf(), entries.abs(), gap)
    error = float(torch.where(off == 0, 0.0, off / gap).max())
    flat = torch.zeros_like(affine.scale, dtype=torch.bool)
    fp32 = torch.float32
    return Levels(affine.bits, affine.scale.to(fp32), None, flat, error, held.to(fp32))


def values(codes: torch.Tensor, affine: Affine) -> torch.Tensor:
    """Return what int8 codes `[rows, columns]` stand for, computed in fp64 and rounded to fp32."""
    scale, offset = affine.scale, affine.offset
    found = torch.empty(codes.shape, dtype=torch.float32)
    step = max(1, _PIECE // codes.shape[1])
    for rows in (slice(start, start + step) for start in range(0, len(codes), step)):
        piece = codes[rows]
        if affine.entries is None:
            numbers = piece.to(torch.float64)
        else:
            numbers = affine.entries[piece.to(torch.int32)]
        grouped = numbers.reshape(len(piece), scale.shape[1], -1)
        grouped.mul_(scale[rows].unsqueeze(2)).add_(offset[rows].unsqueeze(2))
        found[rows] = grouped.flatten(1)
    return found


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes in `words`, one behind the other from the lowest bit of the first on.

    Args:
        words: uint8, int32 or uint32 `[rows, count]`, read as little-endian; of 3 and 6 bits a
            row has a multiple of three bytes.
        bits: 2, 3, 4, 6 or 8.

    Returns:
        uint8 `[rows, count * 8 * itemsize / bits]`.
    """
    octets = words.contiguous().view(torch.uint8)
    width = 8
    if bits in (3, 6):
        threes = octets.view(len(octets), -1, 3).to(torch.int32)
        octets = threes[:, :, 0] | threes[:, :, 1] << 8 | threes[:, :, 2] << 16
        width = 24
    shifts = range(0, width, bits)
    codes = [(octets >> shift & 2**bits - 1).to(torch.uint8) for shift in shifts]
    return torch.stack(codes, dim=2).flatten(1)


def signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 codes from 0 on as int8 codes from `-2**(bits - 1)` on."""
    lowered: torch.Tensor = codes - 2 ** (bits - 1)  # uint8 wraps, as int8 does
    return lowered.view(torch.int8)


def _halves(numbers: torch.Tensor, what: str) -> torch.Tensor:
    """Return fp64 numbers, rounded to fp16."""
    halves = numbers.to(torch.float16)
    if not bool(torch.isfinite(halves).all()):
        bad = float(numbers[~torch.isfinite(halves)][0])
        raise ValueError(f"a {what} is {bad:g}, which fp16 cannot hold")
    return halves.to(torch.float64)
