"""slice_by_index and slice_update against numpy and coremltools' own rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil.ops.defs._utils import solve_slice_by_index_slice
from hypothesis import given
from hypothesis import strategies as st

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.slicing import (
    slice_by_index,
    slice_by_size,
    slice_update,
    slice_update_in_place,
)

X = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)


@st.composite
def slices(draw: Any) -> dict[str, Any]:
    bounds = [st.integers(-size - 1, size + 1) for size in X.shape]
    return {
        "begin": [draw(bound) for bound in bounds],
        "end": [draw(bound) for bound in bounds],
        "stride": [draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in bounds],
        "begin_mask": [draw(st.booleans()) for _ in bounds],
        "end_mask": [draw(st.booleans()) for _ in bounds],
        "squeeze_mask": [draw(st.integers(0, 4)) == 0 for _ in bounds],
    }


def numpy_slice(given: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    index = solve_slice_by_index_slice(
        X.shape, *(given[k] if k != "stride" else list(given[k]) for k in given)
    )
    squeezed = tuple(axis for axis, flag in enumerate(given["squeeze_mask"]) if flag)
    return index, squeezed


def inside(given: dict[str, Any]) -> bool:
    """Whether every squeezed axis names an element; numpy and torch differ on the others."""
    return all(
        given["begin_mask"][axis] or -size <= given["begin"][axis] < size
        for axis, size in enumerate(X.shape)
        if given["squeeze_mask"][axis]
    )


@given(slices(), st.booleans())
def test_slice_by_index(given: dict[str, Any], dynamic: bool) -> None:
    index, squeezed = numpy_slice(given)
    if not inside(given):
        with pytest.raises((IndexError, ArtifactError)):
            slice_by_index(torch.from_numpy(X), **given)
        return
    expected = np.squeeze(X[index], squeezed)
    if dynamic:
        for bound in ("begin", "end"):
            given[bound] = torch.tensor(given[bound], dtype=torch.int32)
    actual = slice_by_index(torch.from_numpy(X), **given)
    np.testing.assert_array_equal(actual.numpy(), expected)


@given(slices())
def test_slice_update(given: dict[str, Any]) -> None:
    index, squeezed = numpy_slice(given)
    if not inside(given):
        return
    expected = X.copy()
    update = -1 - np.arange(expected[index].size, dtype=np.float32).reshape(expected[index].shape)
    expected[index] = update
    given["update"] = torch.from_numpy(np.squeeze(update, squeezed))
    source = torch.from_numpy(X.copy())
    np.testing.assert_array_equal(slice_update(source, **given).numpy(), expected)
    np.testing.assert_array_equal(source.numpy(), X)
    assert slice_update_in_place(source, **given) is source
    np.testing.assert_array_equal(source.numpy(), expected)


def test_update_is_not_broadcast() -> None:
    with pytest.raises(ArtifactError, match="writes"):
        slice_update(torch.zeros(4), torch.ones(1), [0], [2])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=3, max_size=3))
def test_slice_by_size(pairs: list[tuple[int, int]]) -> None:
    begin = [start for start, _ in pairs]
    rest = [size - start for size, start in zip(X.shape, begin, strict=True)]
    size = [-1 if length > left else length for (_, length), left in zip(pairs, rest, strict=True)]
    actual = slice_by_size(torch.from_numpy(X), begin, size)
    index = tuple(
        slice(start, None if length == -1 else start + length)
        for start, length in zip(begin, size, strict=True)
    )
    np.testing.assert_array_equal(actual.numpy(), X[index])


def test_slice_by_size_beyond_the_end_is_refused() -> None:
    with pytest.raises((RuntimeError, IndexError)):
        slice_by_size(torch.zeros(4), [2], [3])
