from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coremltools.libmilstoragepython import _BlobStorageWriter
from coremltools.optimize._utils import pack_elements_into_bits
from hypothesis import given
from hypothesis import strategies as st

from llm_coreml.artifact import weight_file as weights
from llm_coreml.artifact.dtypes import DTYPES
from llm_coreml.artifact.weight_file import WeightFile, unpack_elements
from llm_coreml.errors import ArtifactError

RANGES = {
    "int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1),
    "uint16": (0, 2**16 - 1),
    "int32": (-(2**31), 2**31 - 1), "uint32": (0, 2**32 - 1), "int4": (-8, 7), "uint1": (0, 1),
    "uint2": (0, 3), "uint3": (0, 7), "uint4": (0, 15), "uint6": (0, 63),
}  # fmt: skip


def blob_file(path: Path, dtype: str, array: np.ndarray) -> tuple[WeightFile, int]:
    """Write `array` behind another blob with coremltools' writer."""
    writer = _BlobStorageWriter(str(path))
    writer.write_float_data(np.zeros(3, np.float32))
    if dtype == "fp16":
        offset = writer.write_fp16_data(array.view(np.uint16))
    elif dtype == "fp32":
        offset = writer.write_float_data(array)
    elif dtype in ("int4", "uint1", "uint2", "uint3", "uint4", "uint6"):
        offset = getattr(writer, f"write_{dtype}_data")(array)
    else:
        offset = getattr(writer, f"write_{dtype}_data")(array)
    del writer
    return WeightFile(memoryview(path.read_bytes()), "weight.bin"), offset


@pytest.mark.parametrize("count", [1, 7, 8, 64, 101])
@pytest.mark.parametrize("dtype", [*RANGES, "fp16", "fp32"])
def test_reads_what_coremltools_writes(dtype: str, count: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(count)
    if dtype in RANGES:
        low, high = RANGES[dtype]
        array = rng.integers(low, high, count, endpoint=True).astype(DTYPES[dtype].array)
    else:
        array = rng.standard_normal(count).astype(DTYPES[dtype].array)
    file, offset = blob_file(tmp_path / "weight.bin", dtype, array)
    read = file.read(offset, dtype, count)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@given(st.sampled_from(["int4", "uint1", "uint2", "uint3", "uint4", "uint6"]), st.data())
def test_unpacks_what_coremltools_packs(dtype: str, data: Any) -> None:
    low, high = RANGES[dtype]
    values = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=40))
    array = np.array(values, DTYPES[dtype].array)
    packed = pack_elements_into_bits(array, DTYPES[dtype].bits)
    unpacked = unpack_elements(packed.tobytes(), DTYPES[dtype], len(values))
    np.testing.assert_array_equal(unpacked, array)


@pytest.mark.parametrize("dtype", ["int4", "uint1", "uint2", "uint3", "uint4", "uint6"])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 83])
def test_unpacks_in_pieces(dtype: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CHUNK", 16)
    row = DTYPES[dtype]
    low, high = RANGES[dtype]
    array = np.random.default_rng(count).integers(low, high, count, endpoint=True).astype(row.array)
    packed = pack_elements_into_bits(array, row.bits).tobytes()
    unpacked = unpack_elements(packed, row, count)
    np.testing.assert_array_equal(unpacked, array)
    assert unpacked.dtype == row.array


@pytest.fixture
def written(tmp_path: Path) -> tuple[bytearray, int]:
    file, offset = blob_file(tmp_path / "weight.bin", "int8", np.arange(64, dtype=np.int8))
    return bytearray(file.data), offset


@pytest.mark.parametrize(
    ("place", "form", "value", "message"),
    [
        (0, "<I", 1, "mark"),
        (4, "<I", 99, "type 99"),
        (4, "<I", 3, "holds uint8"),
        (8, "<Q", 63, "bits"),
        (8, "<Q", 1 << 40, "truncated"),
        (16, "<Q", 1 << 63, "truncated"),
    ],
)
def test_wrong_metadata_is_refused(
    written: tuple[bytearray, int], place: int, form: str, value: int, message: str
) -> None:
    data, offset = written
    struct.pack_into(form, data, offset + place, value)
    with pytest.raises(ArtifactError, match=message):
        WeightFile(memoryview(data), "weight.bin").read(offset, "int8", 64)


def test_places_outside_of_the_file_are_refused(written: tuple[bytearray, int]) -> None:
    file = WeightFile(memoryview(written[0]), "weight.bin")
    for offset in (-64, len(written[0]) - 63, 1 << 60):
        with pytest.raises(ArtifactError, match="outside"):
            file.read(offset, "int8", 64)
    with pytest.raises(ArtifactError, match="63 elements"):
        file.read(written[1], "int8", 63)


def test_other_versions_and_short_files_are_refused(written: tuple[bytearray, int]) -> None:
    data = written[0]
    struct.pack_into("<I", data, 4, 3)
    with pytest.raises(ArtifactError, match="version 3"):
        WeightFile(memoryview(data), "weight.bin")
    with pytest.raises(ArtifactError, match="header"):
        WeightFile(memoryview(b"123"), "weight.bin")


def test_truncated_weights_are_refused(written: tuple[bytearray, int]) -> None:
    data, offset = written
    for size in range(64, len(data), 16):
        with pytest.raises(ArtifactError):
            WeightFile(memoryview(data)[:size], "weight.bin").read(offset, "int8", 64)


def test_counts_that_fill_no_byte() -> None:
    for bits in (1, 2, 3, 4, 6):
        row = DTYPES[f"uint{bits}"]
        full = bytes([255]) * math.ceil(5 * bits / 8)
        assert unpack_elements(full, row, 5).tolist() == [(1 << bits) - 1] * 5
