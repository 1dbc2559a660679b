"""The fp16 numbers of an import, and what they are off by, against numpy's fp16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_coreml.checkpoint.matrix import Affine, fit, unpack


def one(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def off(value: float) -> float:
    """Return by which share fp16 misses a number."""
    return abs(float(np.float16(value)) - value) / abs(value)


@pytest.mark.parametrize(
    ("bits", "ends", "furthest"), [(4, None, 8), (8, None, 128), (8, (0, 31), 31), (6, (-3, 2), 3)]
)
def test_a_rounded_scale_is_off_most_at_the_furthest_code(
    bits: int, ends: tuple[int, int] | None, furthest: int
) -> None:
    levels = fit(Affine(bits, one(0.1), one(0), ends))
    assert levels.kind == "none"
    assert levels.error == pytest.approx(furthest * off(0.1), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-7, -3e-6])
def test_small_scales_lose_digits_and_say_so(scale: float) -> None:
    assert fit(Affine(4, one(scale), one(0))).error == pytest.approx(8 * off(scale), rel=1e-9)


def test_groups_of_one_value_keep_it() -> None:
    levels = fit(Affine(4, one(0), one(0.375)))
    assert (levels.error, float(levels.scale), bool(levels.flat)) == (0.0, 0.375, True)
    assert levels.zero_point is not None and int(levels.zero_point) == -1
    assert fit(Affine(4, one(0), one(0.1))).error == pytest.approx(off(0.1), rel=1e-9)
    nothing = fit(Affine(4, one(0), one(0)))
    assert (nothing.error, nothing.zero_point, bool(nothing.flat)) == (0.0, None, False)


@pytest.mark.parametrize(
    ("zero", "kind"), [(0.0, "none"), (-8.0, "int"), (7.0, "int"), (8.0, "float"), (2.5, "float")]
)
def test_zero_points_are_integers_where_they_can_be(zero: float, kind: str) -> None:
    levels = fit(Affine(4, one(0.5), one(-0.5 * zero)))
    assert (levels.kind, levels.error) == (kind, 0.0)


@pytest.mark.parametrize(
    ("scale", "offset", "message"),
    [
        (float("nan"), 0.0, "a scale is nan"),
        (1e6, 0.0, r"a scale is 1e\+06"),
        (0.0, float("inf"), "a scale is inf"),
        (0.5, float("nan"), "a zero point is nan"),
        (1e-9, float("nan"), "a zero point is nan"),
        (1e-6, 1.0, "a zero point is -"),
    ],
)
def test_numbers_beyond_fp16_are_refused(scale: float, offset: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*, which fp16 cannot hold"):
        fit(Affine(4, one(scale), one(offset)))


def test_tables_are_off_by_shares_of_their_smallest_gap() -> None:
    entries = torch.tensor([-0.3, 0.0, 0.1, 1.0], dtype=torch.float64)
    levels = fit(Affine(2, one(-0.7), one(0), entries=entries))
    held = np.float16(-0.7).astype(float) * np.float16(entries.numpy()).astype(float)
    furthest = np.abs(held + 0.7 * entries.numpy()).max()
    assert levels.error == pytest.approx(float(furthest) / (0.7 * 0.1), rel=1e-9)
    with pytest.raises(ValueError, match="its table has one value only"):
        fit(Affine(2, one(1), one(0), entries=torch.zeros(4, dtype=torch.float64)))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_unpacking_reads_the_stream_from_the_lowest_bit(bits: int) -> None:
    octets = np.random.default_rng(0).integers(0, 256, (3, 12), dtype=np.uint8)
    stream = "".join(f"{octet:08b}"[::-1] for octet in octets[1])
    expected = [int(stream[at : at + bits][::-1], 2) for at in range(0, 96, bits)]
    found = unpack(torch.from_numpy(octets.view("<i4")), bits)
    assert found[1].tolist() == expected
