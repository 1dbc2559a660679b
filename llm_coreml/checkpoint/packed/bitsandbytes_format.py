"""bitsandbytes: 4 bit floats in blocks along the flattened matrix, NF4 and FP4, and 8 bit integers.

`weight` uint8 [N * K / 2, 1], the first code of a byte in its high bits, or the same bytes as
numbers of another type (`bnb_4bit_quant_storage`); `weight.quant_map` [16],
what they stand for; `weight.absmax` [blocks], the scale of each block; and a JSON object in bytes
with the shape and the block's size. Of nested ones `absmax` is uint8, places in
`weight.nested_quant_map` [256], scaled by blocks of `weight.nested_absmax`, plus an offset.

Of 8 bits, `weight` int8 [N, K] and `SCB` [N]: a code q stands for `SCB / 127 * q`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, final

import torch

from llm_coreml.checkpoint.checkpoint import WEIGHT_DTYPES, type_name
from llm_coreml.checkpoint.matrix import Affine
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts
from llm_coreml.errors import UnsupportedError

_LONGEST = 4096
_STORAGE = (torch.uint8, torch.int8, *WEIGHT_DTYPES)


@final
@dataclass(frozen=True)
class BitsAndBytes(PackedFormat):
    """Codes of 4 bits of one `kind`."""

    kind: Literal["nf4", "fp4"]

    label = "bitsandbytes"
    optional = ("weight.nested_absmax", "weight.nested_quant_map")

    @property
    def suffixes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the parts that every matrix has."""
        return ("weight", "weight.absmax", "weight.quant_map", self._settings)

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        sizes = self._state(parts).get("shape")
        if (
            not isinstance(sizes, list)
            or len(sizes) != 2
            or not all(isinstance(size, int) and size > 0 for size in sizes)
        ):
            raise parts.error(f"its shape is {sizes!r}, which is no matrix")
        return sizes[0], sizes[1]

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        size = self._number(parts, "blocksize")
        if columns % size:
            raise UnsupportedError(
                f"'{parts.module}' has {columns} inputs, so that bitsandbytes' blocks of {size} go "
                "beyond a row, where Core ML's cannot. Give the unquantized checkpoint."
            )
        scale = self._absmax(parts, rows * columns // size).view(rows, -1)
        entries = parts.numbers("weight.quant_map", (16,))
        return Affine(4, scale, torch.zeros_like(scale), entries=entries)

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        rows, columns = self.shape(parts)
        storage = parts.dtype("weight")
        if storage not in _STORAGE:
            raise parts.error(f"weight is {type_name(storage)}")
        count = rows * columns // 2 // storage.itemsize
        stored = parts.read("weight", (count, 1), (storage,))
        octets = stored.contiguous().view(torch.uint8).view(-1, 1)
        codes = torch.cat([octets >> 4, octets & 15], dim=1)
        return codes.view(torch.int8).view(rows, columns)

    def _absmax(self, parts: Parts, count: int) -> torch.Tensor:
        if "weight.nested_absmax" not in parts:
            return parts.numbers("weight.absmax", (count,))
        size = self._number(parts, "nested_blocksize")
        places = parts.read("weight.absmax", (count,), (torch.uint8,)).to(torch.int64)
        table = parts.numbers("weight.nested_quant_map", (256,))
        outer = parts.numbers("weight.nested_absmax", (-(-count // size),))
        offset = self._state(parts).get("nested_offset")
        if not isinstance(offset, float):
            raise parts.error(f"its nested_offset is {offset!r}, which is no number")
        return table[places] * outer[torch.arange(count) // size] + offset

    @property
    def _settings(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    def _state(self, parts: Parts) -> dict[str, Any]:
        (count,) = parts.shape(self._settings, dims=1)
        if count > _LONGEST:
            raise parts.error(f"its settings take {count} bytes")
        octets = bytes(parts.read(self._settings, (count,), (torch.uint8,)).tolist())
        try:
            found = json.loads(octets)
        except (ValueError, RecursionError) as error:
            raise parts.error(f"its settings are no JSON: {error}") from error
        return found if isinstance(found, dict) else {}

    def _number(self, parts: Parts, key: str) -> int:
        value = self._state(parts).get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise parts.error(f"its {key} is {value!r}, which is no number of at least 1")
        return value


@final
@dataclass(frozen=True)
class BitsAndBytes8(PackedFormat):
    """Codes of 8 bits with a scale for each row."""

    label = "bitsandbytes"
    suffixes = ("weight", "SCB")
    optional = ("weight_format",)

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, columns = parts.shape("weight")
        return rows, columns

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        rows, _ = self.shape(parts)
        if "weight_format" in parts and bool(parts.read("weight_format", (), (torch.uint8,))):
            raise UnsupportedError(
                f"'{parts.module}' is stored in the order of a kernel, which cannot be read. Save "
                "the model again with a present bitsandbytes."
            )
        scale = parts.numbers("SCB", (rows,)).view(rows, 1) / 127
        return Affine(8, scale, torch.zeros_like(scale), (-127, 127))

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        return parts.read("weight", self.shape(parts), (torch.int8,))
