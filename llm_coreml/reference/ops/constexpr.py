"""Compressed constants: quantized, palettized and sparse weights, expanded once at load."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from llm_coreml.artifact.dtypes import DTYPES
from llm_coreml.artifact.weight_file import unpack_elements
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Tensor, named_by, op, same

# Elements per step of a table look-up: their places take four bytes each.
_CHUNK = 1 << 18


@op(
    "constexpr_blockwise_shift_scale",
    same("scale"),
    fresh=True,
    rows=("data", "scale", "offset"),
)
def constexpr_blockwise_shift_scale(
    data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensor:
    """Return scale * (data - offset), each scale and offset serving one block of data.

    Args:
        data: [*D] integers or floats.
        scale: [*S]; each S divides the D of its axis.
        offset: [*S], integers or floats.

    Returns:
        [*D], computed in fp32.
    """
    blocks = _blocks(data, scale)
    interleaved = [
        size for s, block in zip(scale.shape, blocks, strict=True) for size in (s, block)
    ]
    spread = [size for s in scale.shape for size in (s, 1)]
    values = data.to(torch.float32, copy=True).reshape(interleaved)
    if offset is not None:
        if offset.shape != scale.shape:
            raise ArtifactError(f"has offsets {list(offset.shape)} and scales {list(scale.shape)}")
        values -= offset.to(torch.float32).reshape(spread)
    # Of one type with the values, the scales take a third of the time.
    values *= scale.to(torch.float32).reshape(spread)
    return values.reshape(data.shape)


def _blocks(data: Tensor, parameter: Tensor) -> list[int]:
    if data.dim() != parameter.dim() or any(
        not count or size % count for size, count in zip(data.shape, parameter.shape, strict=False)
    ):
        raise ArtifactError(
            f"has {list(parameter.shape)} blocks, which do not divide {list(data.shape)}"
        )
    return [size // count for size, count in zip(data.shape, parameter.shape, strict=True)]


@op("constexpr_affine_dequantize", same("scale"), fresh=True)
def constexpr_affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    """Return scale * (quantized_data - zero_point), both scalars or vectors along axis."""
    sizes = [1] * quantized_data.dim()
    sizes[axis] = -1
    shift = zero_point.to(torch.float32)
    # In place: a weight is large, and so would be every further copy.
    values = quantized_data.to(torch.float32, copy=True)
    values -= shift.reshape(sizes) if shift.dim() else shift
    values *= scale.reshape(sizes) if scale.dim() else scale
    return values


@op("constexpr_cast", named_by("output_dtype"), fresh=True)
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    """Return the fp16 constant as fp32."""
    if output_dtype != "fp32":
        raise ArtifactError(f"casts to {output_dtype}; only fp32 is defined")
    return source_val.clone()


@op("constexpr_lut_to_dense", same("lut"), exact=True, fresh=True, rows=("indices", "lut"))
def constexpr_lut_to_dense(
    indices: Tensor,
    lut: Tensor,
    vector_axis: int | None = None,
    shape: list[int] | None = None,
) -> Tensor:
    """Return the table entries that indices name.

    Args:
        indices: [*D], one per element; or, with `shape`, packed bytes [M] (the iOS 16 form).
        lut: [*G, entries, V], each G dividing the D of its axis; or [entries] with `shape`.
        vector_axis: the axis along which the V values of an entry are laid out.
        shape: the shape of the result in the iOS 16 form.

    Returns:
        [*D], with the size of vector_axis times V.
    """
    if shape is not None:
        flat = _unpack(indices, lut.numel().bit_length() - 1, math.prod(shape))
        return constexpr_lut_to_dense(flat, lut.reshape(1, -1, 1)).reshape(shape)
    if lut.dim() != indices.dim() + 2:
        raise ArtifactError(f"has a table of rank {lut.dim()} for indices of rank {indices.dim()}")
    width = lut.shape[-1]
    if vector_axis is None and width > 1:
        raise ArtifactError("has a table of vectors and no vector_axis")
    axis = (vector_axis or 0) % indices.dim()
    sizes = list(indices.shape)
    result = torch.empty(
        [*sizes[: axis + 1], width, *sizes[axis + 1 :]], dtype=lut.dtype, device=lut.device
    )
    entries = lut.reshape(-1, width)
    for rows, places in _places(indices, lut):
        for at in range(width):
            values = entries[:, at].index_select(0, places.reshape(-1))
            result.select(axis + 1, at)[rows] = values.reshape(places.shape)
    return result.flatten(axis, axis + 1)


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    row = DTYPES[f"uint{bits}"]
    if packed.numel() != math.ceil(bits * count / 8):
        raise ArtifactError(f"packs {count} indices of {bits} bits into {packed.numel()} bytes")
    elements = unpack_elements(packed.cpu().numpy().data, row, count)
    return torch.from_numpy(elements).to(packed.device)


def _places(indices: Tensor, lut: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of indices [*D], and for each element its entry's place among all tables.

    Args:
        indices: the places within the tables.
        lut: [*G, entries, V], each G dividing the D of its axis.

    Raises:
        ArtifactError: an index has no entry, or the tables' blocks do not divide the indices.
    """
    groups, entries = lut.shape[:-2], lut.shape[-2]
    blocks = _blocks(indices, lut[..., 0, 0])
    if indices.numel():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= entries:
            raise ArtifactError(f"has index {min(low, 0) or high} into a table of {entries}")
    kind = torch.int32 if lut.numel() < 1 << 31 else torch.int64
    starts = [
        torch.arange(size, dtype=kind, device=indices.device).div_(block, rounding_mode="floor")
        * (math.prod(groups[axis + 1 :]) * entries)
        for axis, (size, block) in enumerate(zip(indices.shape, blocks, strict=True))
    ]
    step = max(1, _CHUNK * indices.shape[0] // max(1, indices.numel()))
    for start in range(0, indices.shape[0], step):
        rows = slice(start, start + step)
        places = indices[rows].to(kind)
        for axis, offsets in enumerate([starts[0][rows], *starts[1:]]):
            if groups[axis] > 1:
                places += offsets.reshape([-1 if at == axis else 1 for at in range(len(groups))])
        yield rows, places


@op("constexpr_sparse_to_dense", same("nonzero_data"), exact=True, fresh=True)
def constexpr_sparse_to_dense(
    nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None
) -> Tensor:
    """Return a tensor of zeros with nonzero_data [N], in order, where mask is set.

    Args:
        nonzero_data: the N kept values.
        mask: uint1 [*D]; or, with `shape`, packed bits (the iOS 16 form).
        shape: the shape of the result in the iOS 16 form.
    """
    if shape is not None:
        mask = _unpack(mask, 1, math.prod(shape)).reshape(shape)
    kept = mask != 0
    if int(kept.sum()) != nonzero_data.numel():
        raise ArtifactError(
            f"has {nonzero_data.numel()} values for {int(kept.sum())} set bits of the mask"
        )
    result = torch.zeros(mask.shape, dtype=nonzero_data.dtype, device=mask.device)
    return result.masked_scatter_(kept, nonzero_data)


@op(
    "constexpr_lut_to_sparse",
    lambda dtypes, constants: ("uint1", dtypes["lut"]),
    exact=True,
)
def constexpr_lut_to_sparse(
    indices_mask: Tensor,
    indices_nonzero_data: Tensor,
    lut: Tensor,
    vector_axis: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mask and the kept values of a sparse tensor whose values come from a table."""
    indices = constexpr_sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = constexpr_lut_to_dense(indices, lut, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1 and vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


@op(
    "constexpr_sparse_blockwise_shift_scale",
    lambda dtypes, constants: ("uint1", dtypes["scale"]),
)
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mask and the kept, dequantized values of a sparse quantized tensor."""
    dense = constexpr_sparse_to_dense(nonzero_data, data_mask)
    return data_mask, constexpr_blockwise_shift_scale(dense, scale, offset)[data_mask != 0]
