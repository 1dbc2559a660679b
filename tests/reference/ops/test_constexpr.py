"""Compressed weights against coremltools' decompression, in files and as plain functions."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (
    constexpr_blockwise_shift_scale as blockwise,
)
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense as lut
from coremltools.optimize._utils import pack_elements_into_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_coreml.artifact.mil import Constant, TensorType
from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops import OPS, constexpr
from llm_coreml.reference.program import constants
from llm_coreml.reference.program.numerics import numerics

RNG = np.random.default_rng(2)


def sub_byte(array: np.ndarray, name: str) -> np.ndarray:
    return array.astype(types.nptype_from_builtin(types.string_to_builtin(name)))


INT4 = sub_byte(RNG.integers(-8, 8, (8, 32)), "int4")
UINT4 = sub_byte(RNG.integers(0, 16, (8, 32)), "uint4")
SCALES = RNG.uniform(0.01, 0.1, (8, 4)).astype(np.float16)
OFFSETS = sub_byte(RNG.integers(0, 16, (8, 4)), "uint4")
INT8 = RNG.integers(-128, 128, (8, 32)).astype(np.int8)
TABLES = RNG.standard_normal((2, 4, 16, 1)).astype(np.float16)
VECTORS = RNG.standard_normal((2, 1, 4, 2)).astype(np.float16)
SIX = sub_byte(RNG.integers(0, 64, (8, 32)), "uint6")
PAIRS = sub_byte(RNG.integers(0, 4, (8, 16)), "uint2")
BITS = sub_byte(RNG.integers(0, 2, (8, 32)), "uint1")

IOS18 = {
    "int4 groups": lambda: mb.constexpr_blockwise_shift_scale(data=INT4, scale=SCALES),
    "uint4 offsets": lambda: mb.constexpr_blockwise_shift_scale(
        data=UINT4, scale=SCALES, offset=OFFSETS
    ),
    "float offsets": lambda: mb.constexpr_blockwise_shift_scale(
        data=UINT4.astype(np.uint8),
        scale=SCALES.astype(np.float32),
        offset=np.full((8, 4), 7.5, np.float32),
    ),
    "int8 channels": lambda: mb.constexpr_blockwise_shift_scale(
        data=INT8, scale=SCALES[:, :1].astype(np.float32)
    ),
    "table of 16": lambda: mb.constexpr_lut_to_dense(indices=UINT4, lut=TABLES),
    "table of 64": lambda: mb.constexpr_lut_to_dense(
        indices=SIX, lut=RNG.standard_normal((1, 1, 64, 1)).astype(np.float16)
    ),
    "vectors": lambda: mb.constexpr_lut_to_dense(indices=PAIRS, lut=VECTORS, vector_axis=1),
    "vectors on rows": lambda: mb.constexpr_lut_to_dense(indices=PAIRS, lut=VECTORS, vector_axis=0),
    "sparse": lambda: mb.constexpr_sparse_to_dense(
        nonzero_data=np.arange(int((BITS != 0).sum()), dtype=np.float16), mask=BITS
    ),
    "nested scales": lambda: mb.constexpr_blockwise_shift_scale(
        data=INT4,
        scale=mb.constexpr_blockwise_shift_scale(
            data=RNG.integers(1, 9, (8, 4)).astype(np.int8), scale=np.full((1, 1), 0.25, np.float16)
        ),
    ),
}  # fmt: skip

IOS16 = {
    "affine": lambda: mb.constexpr_affine_dequantize(
        quantized_data=INT8, zero_point=np.int8(3), scale=SCALES[:, 0], axis=0
    ),
    "affine scalar": lambda: mb.constexpr_affine_dequantize(
        quantized_data=INT8, zero_point=np.int8(-3), scale=np.float32(0.1), axis=0
    ),
    "table": lambda: mb.constexpr_lut_to_dense(
        lut=TABLES[0, 0, :, 0],
        indices=pack_elements_into_bits(np.asarray(UINT4), 4),
        shape=np.array([8, 32], np.uint32),
    ),
    "sparse": lambda: mb.constexpr_sparse_to_dense(
        nonzero_data=np.arange(int((BITS != 0).sum()), dtype=np.float32),
        mask=np.packbits(np.asarray(BITS).reshape(-1).astype(np.uint8), bitorder="little"),
        shape=np.array([8, 32], np.uint32),
    ),
    "cast": lambda: mb.constexpr_cast(source_val=SCALES, output_dtype="fp32"),
}


@pytest.mark.parametrize(
    ("target", "cases"), [(ct.target.iOS18, IOS18), (ct.target.iOS16, IOS16)], ids=["18", "16"]
)
def test_equals_coremltools(target: Any, cases: dict[str, Any], load_program: Any) -> None:
    expected = []

    def body(inputs: dict[str, Any]) -> list[Any]:
        results = []
        for build in cases.values():
            var = build()
            expected.append(np.asarray(var.op.materialized_val_inference()))
            zero = np.zeros((), expected[-1].dtype)
            results.append(mb.add(x=var, y=zero))
        return [*results, inputs["x"]]

    program = load_program({"x": mb.placeholder(shape=(1,))}, body, target)
    results = program({"x": torch.zeros(1)})
    for number, (name, value) in enumerate(zip(cases, expected, strict=True)):
        actual = results[f"out_{number}"].numpy()
        assert actual.dtype == value.dtype, name
        np.testing.assert_array_equal(actual, value, err_msg=name)


@settings(max_examples=40)
@given(
    st.tuples(*[st.sampled_from([1, 2, 3]) for _ in range(2)]),
    st.tuples(*[st.sampled_from([1, 2, 5]) for _ in range(2)]),
    st.integers(0, 2**32 - 1),
)
def test_blocks(counts: tuple[int, int], blocks: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (counts[0] * blocks[0], counts[1] * blocks[1])
    data = rng.integers(-8, 8, shape).astype(np.int8)
    scale = rng.standard_normal(counts).astype(np.float32)
    offset = rng.integers(-8, 8, counts).astype(np.int8)
    actual = constexpr.constexpr_blockwise_shift_scale(
        torch.from_numpy(data), torch.from_numpy(scale), torch.from_numpy(offset)
    )
    np.testing.assert_array_equal(actual.numpy(), blockwise.decompress(data, scale, offset))


@settings(max_examples=40)
@given(
    st.tuples(*[st.sampled_from([1, 2]) for _ in range(2)]),
    st.tuples(*[st.sampled_from([1, 3]) for _ in range(2)]),
    st.integers(1, 8),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0, 1, -1]),
    st.integers(0, 2**32 - 1),
)
def test_tables(
    groups: tuple[int, int], blocks: tuple[int, int], bits: int, width: int, axis: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (groups[0] * blocks[0], groups[1] * blocks[1])
    indices = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    table = rng.standard_normal((*groups, 1 << bits, width)).astype(np.float32)
    actual = constexpr.constexpr_lut_to_dense(
        torch.from_numpy(indices), torch.from_numpy(table), None if width == 1 else axis
    )
    expected = lut.decompress(indices, table, None if width == 1 else axis)
    np.testing.assert_array_equal(actual.numpy(), expected)


def test_large_tables_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constexpr, "_CHUNK", 40)
    indices = RNG.integers(0, 16, (9, 12)).astype(np.uint8)
    table = RNG.standard_normal((3, 2, 16, 1)).astype(np.float32)
    actual = constexpr.constexpr_lut_to_dense(torch.from_numpy(indices), torch.from_numpy(table))
    np.testing.assert_array_equal(actual.numpy(), lut.decompress(indices, table, None))


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_rows_of_the_parameters_give_rows_of_the_result(rows: int) -> None:
    """What a weight that stays packed relies on; three rows of the data share a parameter."""
    data = torch.from_numpy(RNG.integers(-8, 8, (18, 8)).astype(np.int8))
    scale = torch.from_numpy(RNG.standard_normal((6, 4)).astype(np.float32))
    whole = constexpr.constexpr_blockwise_shift_scale(data, scale, scale)
    indices = data.to(torch.int16).add(8).to(torch.uint8)
    table = torch.from_numpy(RNG.standard_normal((6, 2, 16, 2)).astype(np.float32))
    looked_up = constexpr.constexpr_lut_to_dense(indices, table, 1)
    for start in range(0, 6, rows):
        part, block = slice(start, start + rows), slice(3 * start, 3 * (start + rows))
        actual = constexpr.constexpr_blockwise_shift_scale(data[block], scale[part], scale[part])
        torch.testing.assert_close(actual, whole[block], rtol=0, atol=0)
        actual = constexpr.constexpr_lut_to_dense(indices[block], table[part], 1)
        torch.testing.assert_close(actual, looked_up[block], rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 12])
@pytest.mark.parametrize("groups", [1, 2])
def test_vectors_along_the_rows_are_expanded_in_slices(
    rows: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "_SMALL", 0)
    monkeypatch.setattr(constants, "_SLICE", 1)
    groups = min(rows, groups)
    indices = RNG.integers(0, 8, (rows, 6)).astype(np.uint8)
    table = RNG.standard_normal((groups, 1, 8, 4)).astype(np.float32)
    expression = constants.Expression(
        "a table",
        OPS["constexpr_lut_to_dense"],
        {
            "indices": Constant(TensorType("uint8", indices.shape), indices),
            "lut": Constant(TensorType("fp32", table.shape), table),
        },
        {"vector_axis": 0},
        TensorType("fp32", (4 * rows, 6)),
    )
    expected = lut.decompress(indices, table, 0)
    actual = constants.expanded(expression, numerics("fp32"), wide=True)
    np.testing.assert_array_equal(actual.numpy(), expected)
    packed = constants.PackedWeight(expression, numerics("fp32"), torch.device("cpu"), True)
    assert len(list(packed.slices())) == (rows if groups == 1 else groups)
    taken = packed.take(torch.tensor([3, 0, 4 * rows - 1]))
    np.testing.assert_array_equal(taken.numpy(), expected[[3, 0, -1]])


_PEAK = """
import torch
from pathlib import Path
from llm_coreml.reference.ops import constexpr

def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

for rows in (16, 8192):
    data = torch.randint(0, 16, (rows, 2048), dtype=torch.uint8)
    table, scale = torch.randn(rows // 16, 4, 16, 1), torch.randn(rows, 2048 // 32)
    for expand in (
        lambda: constexpr.constexpr_lut_to_dense(data, table),
        lambda: constexpr.constexpr_blockwise_shift_scale(data, scale, scale),
    ):
        Path("/proc/self/clear_refs").write_text("5")
        before = megabytes("VmRSS")
        expand()
        print((megabytes("VmHWM") - before) / (rows * 2048 * 4 / 2**20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_expanding_takes_little_more_than_the_result() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], check=True, capture_output=True, text=True)
    # The first two are small ones, which bring in what every later call shares.
    for ratio in map(float, done.stdout.split()[2:]):
        assert 0.9 < ratio < 1.3


@pytest.mark.parametrize("shape", [(3, 4), (8, 5), (8,)])
def test_blocks_that_do_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match="do not divide"):
        constexpr.constexpr_blockwise_shift_scale(
            torch.zeros(8, 32, dtype=torch.int8), torch.ones(shape)
        )


def test_index_beyond_the_table_is_refused() -> None:
    with pytest.raises(ArtifactError, match="index 9"):
        constexpr.constexpr_lut_to_dense(
            torch.full((2, 2), 9, dtype=torch.uint8), torch.zeros(1, 1, 8, 1)
        )
