"""Tensors without elements, which a chunk of length 0 or a filter that keeps nothing gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops import OPS

X = np.zeros((2, 0, 4), np.float32)
FULL = np.arange(8, dtype=np.float32).reshape(2, 4)
NONE = np.zeros((0,), np.int32)
CPU = torch.device("cpu")

CASES: dict[str, tuple[str, dict[str, Any], np.ndarray | Callable[[], np.ndarray]]] = {
    "add": ("add", {"x": X, "y": np.ones((1, 4), np.float32)}, X),
    "cast": ("cast", {"x": X, "dtype": "int32"}, X.astype(np.int32)),
    "softmax": ("softmax", {"x": X, "axis": 1}, X),
    "layer_norm": ("layer_norm", {"x": X, "axes": [-1]}, X),
    "linear": ("linear", {"x": X, "weight": np.ones((3, 4), np.float32)}, X[..., :3]),
    "matmul": ("matmul", {"x": X, "y": np.ones((4, 3), np.float32)}, X[..., :3]),
    "inner": ("matmul", {"x": X.swapaxes(1, 2), "y": X}, np.zeros((2, 4, 4), np.float32)),
    "concat": ("concat", {"values": [X, FULL[:, None]], "axis": 1}, FULL[:, None]),
    "stack": ("stack", {"values": [X, X], "axis": 0}, np.stack([X, X])),
    "split": ("split", {"x": X, "axis": 1, "split_sizes": [0, 0]}, X),
    "reshape": ("reshape", {"x": X, "shape": [8, 0]}, X.reshape(8, 0)),
    "transpose": ("transpose", {"x": X, "perm": [1, 2, 0]}, X.transpose(1, 2, 0)),
    "tile": ("tile", {"x": X, "reps": [1, 3, 2]}, np.tile(X, (1, 3, 2))),
    "tile_none": ("tile", {"x": FULL, "reps": [0, 1]}, FULL[:0]),
    "pad": ("pad", {"x": X, "pad": [1, 1, 0, 0], "constant_val": 2.0}, np.full((2, 2, 4), 2.0)),
    "slice": ("slice_by_index", {"x": FULL, "begin": [0, 2], "end": [2, 2]}, FULL[:, 2:2]),
    "slice_back": (
        "slice_by_index",
        {"x": FULL, "begin": [0, 1], "end": [2, 3], "stride": [1, -1]},
        FULL[:, 1:3:-1],
    ),
    "slice_size": ("slice_by_size", {"x": FULL, "begin": [1, 4], "size": [0, -1]}, FULL[1:1, 4:]),
    "update": (
        "slice_update",
        {"x": FULL, "update": FULL[:, :0], "begin": [0, 3], "end": [2, 3]},
        FULL,
    ),
    "reduce_sum": ("reduce_sum", {"x": X, "axes": [1]}, np.zeros((2, 4), np.float32)),
    "reduce_sum_int": (
        "reduce_sum", {"x": X.astype(np.int32), "axes": [1]}, np.zeros((2, 4), np.int32),
    ),
    "reduce_kept": ("reduce_max", {"x": X, "axes": [2]}, X[..., 0]),
    "argmax": ("reduce_argmax", {"x": X, "axis": 2}, X[..., 0].astype(np.int32)),
    "argsort": ("argsort", {"x": X, "axis": 1}, X.astype(np.int32)),
    "topk": ("topk", {"x": FULL, "k": 0, "axis": 1, "return_indices": False}, FULL[:, :0]),
    "cumsum": ("cumsum", {"x": X, "axis": 1, "exclusive": True, "declared": "fp32"}, X),
    "gather": ("gather", {"x": FULL, "indices": NONE, "axis": 1}, FULL[:, :0]),
    "gather_of_none": ("gather", {"x": X, "indices": NONE, "axis": 1}, X),
    "gather_batch": (
        "gather", {"x": FULL, "indices": X[:, :, 0].astype(np.int32), "axis": 1, "batch_dims": 1},
        FULL[:, :0],
    ),
    "gather_no_batch": (
        "gather", {"x": FULL[:0], "indices": X[0].astype(np.int32), "axis": 1, "batch_dims": 1},
        X[0],
    ),
    "gather_along": (
        "gather_along_axis", {"x": FULL, "indices": X[:, :, 0].astype(np.int32), "axis": 1},
        FULL[:, :0],
    ),
    "gather_nd": ("gather_nd", {"x": FULL, "indices": X[0, :, :1].astype(np.int32)}, FULL[:0]),
    "non_zero": ("non_zero", {"x": np.zeros((2, 3), np.float32)}, np.zeros((0, 2), np.int32)),
    "reverse_sequence": (
        "reverse_sequence", {"x": X, "lengths": np.zeros(2, np.int32), "seq_axis": 1}, X,
    ),
    "band_part": ("band_part", {"x": X, "lower": 1}, X),
    "one_hot": (
        "one_hot", {"indices": NONE, "one_hot_vector_size": 3, "declared": "int32"},
        np.zeros((0, 3), np.int32),
    ),
    "fill": (
        "fill", {"shape": [0, 2], "declared": "fp32", "device": CPU}, np.zeros((0, 2), np.float32),
    ),
    "range": (
        "range_1d", {"start": 2, "end": 2, "step": 1, "declared": "int32", "device": CPU}, NONE,
    ),
    "sliding": ("sliding_windows", {"x": X, "axis": 2, "size": 2}, np.zeros((2, 0, 3, 2))),
}  # fmt: skip
for _mode in ("add", "mul", "min", "update"):
    CASES[f"scatter_{_mode}"] = (
        "scatter",
        {"data": FULL, "indices": NONE, "updates": FULL[:, :0], "axis": 1, "mode": _mode},
        FULL,
    )
    CASES[f"scatter_nd_{_mode}"] = (
        "scatter_nd",
        {"data": FULL, "indices": X[0].astype(np.int32)[:, :1], "updates": FULL[:0], "mode": _mode},
        FULL,
    )


def tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return [tensors(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", CASES)
def test_nothing_gives_nothing(case: str) -> None:
    name, arguments, expected = CASES[case]
    result = OPS[name].function(**{key: tensors(value) for key, value in arguments.items()})
    result = result[0] if isinstance(result, tuple) else result
    assert result.shape == expected.shape
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize("name", ["reduce_max", "reduce_argmax", "reduce_argmin"])
def test_nothing_has_no_extreme(name: str) -> None:
    axes = {"axes": [1]} if name == "reduce_max" else {"axis": 1}
    with pytest.raises((RuntimeError, IndexError)):
        OPS[name].function(x=torch.from_numpy(X), **axes)


def test_an_index_into_nothing_is_refused() -> None:
    with pytest.raises(ArtifactError, match="index 0 of 0"):
        OPS["gather"].function(
            x=torch.from_numpy(X), indices=torch.zeros(1, dtype=torch.int32), axis=1
        )


@pytest.mark.parametrize("name", ["gather", "gather_nd"])
def test_batches_that_differ_are_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="batch axes"):
        OPS[name].function(
            x=torch.from_numpy(FULL), indices=torch.zeros(1, 1, dtype=torch.int32), batch_dims=1
        )
