"""Quantized checkpoints, packed here by their formats' definitions, with the values that they mean.

Nothing of the package is used: codes, scales and zero points are drawn, packed bit by bit in numpy,
and the value of each weight is computed from them in fp64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tiny import llama, save

Array = np.ndarray[Any, Any]
Tensors = dict[str, torch.Tensor]
# A packer draws one matrix [rows, columns]: its parts by suffix, and its values in fp64.
Packer = Callable[[np.random.Generator, int, int], tuple[Tensors, Array]]


def words(codes: Array, bits: int) -> torch.Tensor:
    """Put codes into int32 words along the last axis, bit by bit from the lowest on."""
    stream = (codes[..., None] >> np.arange(bits)) & 1
    octets = np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return torch.from_numpy(octets.view("<i4"))


def draw(
    rng: np.random.Generator, rows: int, columns: int, bits: int, group: int
) -> tuple[Array, Array]:
    """Return codes from 0 on, int64 `[rows, columns]`, and fp16 scales `[rows, groups]`."""
    codes = rng.integers(0, 2**bits, (rows, columns))
    codes[:, ::group], codes[:, 1::group] = 0, 2**bits - 1  # the ends, where errors are largest
    scale = rng.uniform(0.5, 1.5, (rows, columns // group)) * 0.3 / 2**bits
    return codes, scale.astype(np.float16)


def affine(codes: Array, scale: Array, zero: Array) -> Array:
    """Return `scale * (codes - zero)` in fp64, a scale and zero for each group of columns."""
    size = codes.shape[1] // scale.shape[1]
    wide = [np.repeat(np.asarray(part, np.float64), size, axis=1) for part in (scale, zero)]
    return wide[0] * (codes - wide[1])


def dealt(seed: int, columns: int, group: int) -> Array:
    """Return the group of each input, dealt at random."""
    return np.random.default_rng(seed).permutation(columns) // group


def scattered(codes: Array, scale: Array, zero: Array, index: Array) -> Array:
    """Return `scale * (codes - zero)` in fp64, with the group of each input in `index`."""
    wide = [np.asarray(part, np.float64)[:, index] for part in (scale, zero)]
    values: Array = wide[0] * (codes - wide[1])
    return values


def half(scale: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(scale))


def gptq(
    bits: int, group: int, version: int, zeros: tuple[int, int], seed: int | None = None
) -> Packer:
    """Return a packer of GPTQ; `zeros` are the lowest and highest zero point.

    With a `seed`, inputs are dealt to groups at random, alike for all matrices of a width.
    """

    def pack(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        codes, scale = draw(rng, rows, columns, bits, group)
        zero = rng.integers(zeros[0], zeros[1] + 1, scale.shape)
        parts = {
            "qweight": words(codes, bits).t().contiguous(),
            "qzeros": words((zero - (2 - version)).T, bits),
            "scales": half(scale.T),
            "g_idx": torch.arange(columns, dtype=torch.int32) // group,
        }
        if seed is None:
            return parts, affine(codes, scale, zero)
        index = dealt(seed, columns, group)
        parts["g_idx"] = torch.from_numpy(index.astype(np.int32))
        return parts, scattered(codes, scale, zero, index)

    return pack


def awq(group: int) -> Packer:
    """Return a packer of AWQ `gemm`: outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up."""

    def outputs(codes: Array) -> torch.Tensor:
        by_word = codes.T.reshape(codes.shape[1], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(by_word.reshape(codes.shape[1], -1), 4)

    def pack(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        codes, scale = draw(rng, rows, columns, 4, group)
        zero = rng.integers(0, 16, scale.shape)
        parts = {"qweight": outputs(codes), "qzeros": outputs(zero), "scales": half(scale.T)}
        return parts, affine(codes, scale, zero)

    return pack


def compressed(
    bits: int, group: int, symmetric: bool, seed: int | None = None, plain: bool = False
) -> Packer:
    """Return a packer of compressed-tensors' `pack-quantized`; of a `seed` see `gptq`.

    With `plain`, zero points are int8, as they were before version 0.9.4.
    """

    def pack(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        codes, scale = draw(rng, rows, columns, bits, group)
        low = 2 ** (bits - 1)
        zero = np.full(scale.shape, low) if symmetric else rng.integers(0, 2 * low, scale.shape)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": half(scale),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(zero.T, bits).t().contiguous()
            if plain:
                parts["weight_zero_point"] = torch.from_numpy((zero - low).astype(np.int8))
        if seed is None:
            parts["weight_g_idx"] = torch.full((columns,), -1, dtype=torch.int32)
            return parts, affine(codes, scale, zero)
        index = dealt(seed, columns, group)
        parts["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        return parts, scattered(codes, scale, zero, index)

    return pack


def plain_bytes(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
    """Pack a matrix of compressed-tensors' `int-quantized`, with a bf16 scale for each row."""
    codes = rng.integers(-128, 128, (rows, columns))
    scale = torch.from_numpy(rng.uniform(1e-3, 2e-3, (rows, 1))).to(torch.bfloat16)
    parts = {"weight": torch.from_numpy(codes.astype(np.int8)), "weight_scale": scale}
    return parts, affine(codes, scale.double().numpy(), np.zeros((rows, 1)))


def fp8(scale: str, shape: str) -> Packer:
    """Return a packer of FP8, a scale for `all`, for each of the `rows` or of 40 x 24 `blocks`."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        numbers = torch.from_numpy(rng.uniform(-400, 400, (rows, columns))).to(torch.float8_e4m3fn)
        sizes = {"all": (1,), "rows": (rows, 1), "blocks": (-(-rows // 40), -(-columns // 24))}
        scales = rng.uniform(1e-4, 3e-4, sizes[shape]).astype(np.float32)
        wide = scales.astype(np.float64)
        if shape == "blocks":
            wide = np.repeat(np.repeat(wide, 40, axis=0)[:rows], 24, axis=1)[:, :columns]
        parts = {"weight": numbers, scale: torch.from_numpy(scales)}
        return parts, numbers.double().numpy() * wide

    return pack


def int8(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
    """Pack a matrix of bitsandbytes' 8 bits, with the largest value of each row."""
    codes = rng.integers(-127, 128, (rows, columns))
    largest = rng.uniform(0.1, 0.4, rows).astype(np.float32)
    parts = {
        "weight": torch.from_numpy(codes.astype(np.int8)),
        "SCB": torch.from_numpy(largest),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, codes * (largest.astype(np.float64)[:, None] / 127)


def mlx(bits: int, group: int, whole: bool) -> Packer:
    """Return a packer of MLX's affine format; `whole` biases are multiples of their scales."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        codes, scale = draw(rng, rows, columns, bits, group)
        scale *= rng.choice([-1, 1], scale.shape).astype(np.float16)
        zero = rng.integers(0, 2**bits, scale.shape)
        # fp16 rounds a product with a number of more than a few bits.
        bias = (-scale * (2 ** (bits - 1) if whole else zero)).astype(np.float16)
        parts = {
            "weight": words(codes, bits).view(torch.uint32),
            "scales": half(scale),
            "biases": half(bias),
        }
        size = columns // scale.shape[1]
        wide = [np.repeat(part.astype(np.float64), size, axis=1) for part in (scale, bias)]
        return parts, wide[0] * codes + wide[1]

    return pack


def hqq(bits: int, group: int, zeros: tuple[float, float], whole: bool = False) -> Packer:
    """Return a packer of HQQ along the inputs; `zeros` is where zero points are drawn from."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        codes, scale = draw(rng, rows, columns, bits, group)
        zero = rng.uniform(*zeros, scale.shape).astype(np.float16)
        zero = zero.round() if whole else zero
        lines = codes.reshape(-1, group).astype(np.uint8)
        if bits == 4:
            lines = lines[: len(lines) // 2] * 16 + lines[len(lines) // 2 :]
        parts = {
            "W_q": torch.from_numpy(lines),
            "scale": half(scale.reshape(-1, 1)),
            "zero": half(zero.reshape(-1, 1)),
            "shape": torch.tensor([rows, columns]),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "axis": torch.tensor(1, dtype=torch.int32),
            "group_size": torch.tensor(group, dtype=torch.int32),
            "packing": torch.tensor([ord(letter) for letter in "4bit_u8"], dtype=torch.uint8),
            "view_as_float": torch.tensor(0, dtype=torch.uint8),
        }
        return parts, affine(codes, scale, zero)

    return pack


def bitnet(divides: bool) -> Packer:
    """Return a packer of BitNet's ternary matrices, whose codes a scale divides or multiplies."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        from transformers.integrations.bitnet import pack_weights

        codes = rng.integers(-1, 2, (rows, columns))
        low, high = (4, 16) if divides else (0.1, 0.4)
        scale = half(rng.uniform(low, high, 1).astype(np.float16))
        factor = 1 / scale.item() if divides else scale.item()
        packed = pack_weights(torch.from_numpy(codes).clone())
        return {"weight": packed, "weight_scale": scale}, codes * factor

    return pack


def mxfp4(mlx: bool) -> Packer:
    """Return a packer of OCP's MXFP4 as MLX or as compressed-tensors lays it out."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        codes = rng.integers(0, 16, (rows, columns))
        exponents = rng.integers(115, 126, (rows, columns // 32))
        codes[0, :32], exponents[0, 0] = 8 * (codes[0, :32] & 1), 0  # zeros of either sign
        sign, power, fraction = codes >> 3, codes >> 1 & 3, codes & 1
        size = np.where(power == 0, fraction / 2, (1 + fraction / 2) * 2.0 ** (power - 1))
        scale = 2.0 ** (exponents.astype(np.float64) - 127)
        values = np.where(sign == 1, -size, size) * np.repeat(scale, 32, axis=1)
        packed, scales = words(codes, 4), torch.from_numpy(exponents.astype(np.uint8))
        if mlx:
            return {"weight": packed.view(torch.uint32), "scales": scales}, values
        return {"weight_packed": packed.view(torch.uint8), "weight_scale": scales}, values

    return pack


# Arbitrary, increasing, and no fp16 numbers, as those of NF4 are none.
FLOATS = np.sort(np.random.default_rng(4).uniform(-1, 1, 16)).astype(np.float32)


def nf4(group: int, nested: bool, storage: torch.dtype = torch.uint8) -> Packer:
    """Return a packer of bitsandbytes' 4 bit floats, whose table the checkpoint brings."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, Array]:
        codes = rng.integers(0, 16, (rows, columns))
        count = rows * columns // group
        settings = {"quant_type": "nf4", "blocksize": group, "shape": [rows, columns]}
        scale = rng.uniform(0.1, 0.4, count).astype(np.float32)
        flat = codes.reshape(-1, 2).astype(np.uint8)
        parts = {
            "weight": torch.from_numpy(flat[:, 0] * 16 + flat[:, 1]).view(storage).view(-1, 1),
            "weight.quant_map": torch.from_numpy(FLOATS.copy()),
            "weight.absmax": torch.from_numpy(scale),
        }
        wide = scale.astype(np.float64)
        if nested:
            places = rng.integers(0, 256, count)
            table = rng.uniform(-1, 1, 256).astype(np.float32)
            outer = rng.uniform(0.05, 0.1, -(-count // 256)).astype(np.float32)
            settings |= {"nested_blocksize": 256, "nested_offset": 0.25}
            parts["weight.absmax"] = torch.from_numpy(places.astype(np.uint8))
            parts["weight.nested_quant_map"] = torch.from_numpy(table)
            parts["weight.nested_absmax"] = torch.from_numpy(outer)
            wide = table.astype(np.float64)[places] * np.repeat(outer, 256)[:count] + 0.25
        octets = np.frombuffer(json.dumps(settings).encode(), np.uint8).copy()
        parts["weight.quant_state.bitsandbytes__nf4"] = torch.from_numpy(octets)
        values = FLOATS.astype(np.float64)[codes] * wide.reshape(rows, -1).repeat(group, axis=1)
        return parts, values

    return pack


def checkpoint(
    folder: Path, settings: dict[str, Any], *packers: Packer, tables: bool = False, **changes: Any
) -> tuple[Path, dict[str, Array]]:
    """Write a tiny Llama whose linear layers `packers` pack in turn.

    Args:
        folder: Where.
        settings: Keys to add to config.json.
        packers: One or more.
        tables: Pack the token table, too, and the head if there is one.
        changes: Of the model's sizes.

    Returns:
        The folder, and the values of each packed matrix by the name of its weight.
    """
    sizes = {"vocab_size": 96, "intermediate_size": 96, **changes}
    save(llama(**sizes).half(), folder)
    tensors = load_file(folder / "model.safetensors")
    rng, meant = np.random.default_rng(7), {}
    for index, name in enumerate(sorted(n for n in tensors if tensors[n].ndim == 2)):
        if "_proj" not in name and not tables:
            continue
        rows, columns = tensors.pop(name).shape
        parts, meant[name] = packers[index % len(packers)](rng, rows, columns)
        module = name.removesuffix("weight")
        tensors |= {module + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder, meant
