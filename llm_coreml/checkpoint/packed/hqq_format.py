"""HQQ along the inputs (axis 1): groups are the rows of what is packed.

The matrix is cut into rows of one group each, [N * groups, group]; of 4 bit codes the first half of
these rows lies in the high bits of `W_q` and the second in the low ones. `scale` and `zero` are
[N * groups, 1], and a code q stands for `scale * (q - zero)`, where zero is any number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from llm_coreml.checkpoint.matrix import Affine, signed
from llm_coreml.checkpoint.packed.parts import PackedFormat, Parts
from llm_coreml.errors import UnsupportedError

_WHOLE = (torch.uint8, torch.int32, torch.int64)


@final
@dataclass(frozen=True)
class HQQ(PackedFormat):
    """Codes of 4 or 8 bits, as every matrix says of itself."""

    label = "HQQ"
    suffixes = ("W_q", "scale", "zero", "shape", "nbits", "axis")
    optional = (
        "channel_wise",
        "compute_dtype",
        "encoded_state_dict",
        "group_size",
        "offload_meta",
        "optimize",
        "packing",
        "quant_scale",
        "quant_zero",
        "round_zero",
        "stores_quant_config",
        "unpack_view_dtype",
        "view_as_float",
    )

    def shape(self, parts: Parts) -> tuple[int, int]:
        """See `PackedFormat`."""
        rows, columns = parts.read("shape", (2,), _WHOLE).tolist()
        if rows < 1 or columns < 1:
            raise parts.error(f"shape is {[rows, columns]}, and no matrix is that small")
        return rows, columns

    def scales(self, parts: Parts) -> Affine:
        """See `PackedFormat`."""
        self._check(parts)
        bits = self._bits(parts)
        rows, columns = self.shape(parts)
        count, _ = parts.shape("scale")
        if count % rows or columns % (count // rows) or count * bits % 8:
            raise parts.error(f"scale has {count} groups, which do not divide {[rows, columns]}")
        scale = parts.numbers("scale", (count, 1)).view(rows, -1)
        zero = parts.numbers("zero", (count, 1)).view(rows, -1)
        return Affine(bits, scale, -scale * (zero - 2 ** (bits - 1)))

    def codes(self, parts: Parts) -> torch.Tensor:
        """See `PackedFormat`."""
        bits = self._bits(parts)
        rows, columns = self.shape(parts)
        count, _ = parts.shape("scale")
        shape = (count * bits // 8, rows * columns // count)
        octets = parts.read("W_q", shape, (torch.uint8,))
        codes = octets if bits == 8 else torch.cat([octets >> 4, octets & 15])
        return signed(codes.view(rows, columns), bits)

    def _bits(self, parts: Parts) -> int:
        bits = int(parts.read("nbits", (), _WHOLE))
        if bits not in (4, 8):
            raise UnsupportedError(
                f"'{parts.module}' has HQQ codes of {bits} bits; 4 and 8 can be read. Give the "
                "unquantized checkpoint."
            )
        return bits

    def _check(self, parts: Parts) -> None:
        axis = int(parts.read("axis", (), _WHOLE))
        if axis != 1:
            raise UnsupportedError(
                f"'{parts.module}' has HQQ groups along axis {axis}, and Core ML's lie along the "
                "inputs. Quantize with axis=1, or give the unquantized checkpoint."
            )
        for option in ("view_as_float", "quant_scale", "quant_zero"):
            if option in parts and int(parts.read(option, (), _WHOLE)):
                raise UnsupportedError(
                    f"'{parts.module}' was quantized by HQQ with {option}, which cannot be read. "
                    f"Quantize without it, or give the unquantized checkpoint."
                )
