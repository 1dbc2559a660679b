"""Weights that were trained with codebooks: the weights as they were trained, their tables beside.

`weight` [N, K] of any floating type, and `weight_fake_quantizer.tables` [row groups, column groups,
2**bits], fp16 and ascending, the table of each block of rows and inputs. A weight stands for the
entry that is nearest to it, of two equally near ones for the lower. Names alone tell of the format,
since `save_pretrained` of a model in training writes nothing of it into config.json.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import final

import torch

from llm_coreml.checkpoint.matrix import Affine
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts

TABLES = "weight_fake_quantizer.tables"
# Bits of codes by the entries of a table.
_BITS = {2**bits: bits for bits in (1, 2, 3, 4, 6, 8)}


@final
class TrainedCodebook(PackedFormat):
    """Nearest entries of tables."""

    label = "trained codebooks"
    suffixes = ("weight", TABLES)

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, columns = parts.shape("weight")
        return rows, columns

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        tables, one = self._tables(parts), torch.ones(self.shape(parts)[0], 1, dtype=torch.float64)
        bits = _BITS[tables.shape[2]]
        return Affine(bits, one, torch.zeros_like(one), entries=tables)

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        weight = parts.read("weight", self.shape(parts))
        if not bool(weight.isfinite().all()):
            raise parts.error("weight has values that are not finite")
        return nearest(weight, self._tables(parts)).view(torch.int8)

    def values(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        return entries_of(self.codes(parts).view(torch.uint8), self._tables(parts).float())

    def _tables(self, parts: Parts) -> torch.Tensor:
        sizes = parts.shape(TABLES, dims=3)
        tables = parts.numbers(TABLES, sizes)
        if sizes[2] not in _BITS:
            raise parts.error(
                f"its tables have {sizes[2]} entries, not {', '.join(map(str, _BITS))}"
            )
        for count, groups, what in zip(self.shape(parts), sizes, ("rows", "inputs"), strict=False):
            if count % groups:
                raise parts.error(f"its {count} {what} do not divide into {groups} blocks")
        if not bool(tables.isfinite().all()):
            raise parts.error("its tables have values that are not finite")
        if bool((tables.diff(dim=2) < 0).any()):
            raise parts.error("its tables are not ascending")
        return tables


def holds_tables(names: Collection[str]) -> bool:
    """Say whether tensors of these names are weights that were trained with codebooks."""
    return any(name.endswith(f".{TABLES}") for name in names)


def nearest(weight: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Return for each weight the place of the nearest entry, of two equally near ones the lower.

    Args:
        weight: Any floating type `[rows, columns]`, compared as fp32.
        tables: Any floating type `[row_groups, column_groups, entries]`, ascending fp16 numbers.

    Returns:
        uint8 `[rows, columns]`.
    """
    groups, flat = groups_of(tables), tables.to(torch.float32).flatten(0, 1)
    middles = ((flat[:, :-1] + flat[:, 1:]) / 2).contiguous()
    places = torch.searchsorted(middles, as_blocks(weight.to(torch.float32), groups))
    return _from_blocks(places.to(torch.uint8), groups, weight.shape[0])


def entries_of(codes: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Return what uint8 codes `[rows, columns]` stand for, of the tables' type."""
    groups = groups_of(tables)
    places = as_blocks(codes, groups).to(torch.int64)
    return _from_blocks(tables.flatten(0, 1).gather(1, places), groups, codes.shape[0])


def groups_of(tables: torch.Tensor) -> tuple[int, int]:
    """Return how many groups of rows, and of columns, have tables of their own."""
    return tables.shape[0], tables.shape[1]


def as_blocks(matrix: torch.Tensor, groups: tuple[int, int]) -> torch.Tensor:
    """Return a matrix as the blocks that have a table each, `[row_groups * column_groups, n]`."""
    row_groups, column_groups = groups
    parted = matrix.reshape(row_groups, -1, column_groups, matrix.shape[1] // column_groups)
    return parted.transpose(1, 2).reshape(row_groups * column_groups, -1)


def _from_blocks(blocks: torch.Tensor, groups: tuple[int, int], rows: int) -> torch.Tensor:
    """Return the matrix of so many rows that `as_blocks` has made `blocks` of."""
    row_groups, column_groups = groups
    parted = blocks.reshape(row_groups, column_groups, rows // row_groups, -1)
    return parted.transpose(1, 2).reshape(rows, -1)
