"""Shapes, indices and reductions."""

from __future__ import annotations

from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb

RNG = np.random.default_rng(1)
A = RNG.standard_normal((2, 3, 4)).astype(np.float32)
B = RNG.standard_normal((2, 3, 4)).astype(np.float32)
M = RNG.standard_normal((5, 5)).astype(np.float32)
N = RNG.integers(-9, 9, (2, 3, 4)).astype(np.int32)
IMAGE = RNG.standard_normal((1, 4, 5, 6)).astype(np.float32)
VECTOR = RNG.standard_normal((4,)).astype(np.float32)


def _shapes() -> dict[str, Any]:
    def interleaved(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([a, b], 2).reshape(2, 6, 4)

    def like(x: Any, y: Any) -> Any:
        return mb.reshape_like(
            x=x, ref_tensors=(y, y), begins=(0, 2), ends=(2, 0), end_masks=(False, True)
        )

    def onehot(axis: int) -> Any:
        return lambda x: mb.one_hot(
            indices=mb.cast(x=x, dtype="int32"),
            one_hot_vector_size=3,
            axis=axis,
            on_value=2.0,
            off_value=-1.0,
        )

    classes = np.array([[0, 2], [1, 0]], np.int32)
    hot = np.where(classes[..., None] == np.arange(3), 2.0, -1.0)
    return {
        "reshape": (lambda x: mb.reshape(x=x, shape=[4, 6]), (A,), None),
        "reshape_infer": (lambda x: mb.reshape(x=x, shape=[-1, 4]), (A,), None),
        "reshape_copy": (lambda x: mb.reshape(x=x, shape=[0, -1]), (M,), None),
        "reshape_right": (lambda x: mb.reshape(x=x, shape=[1, 0, -1, 0]), (A,), None),
        "reshape_like": (like, (A, B), lambda x, y: x),
        "expand_dims": (lambda x: mb.expand_dims(x=x, axes=[0, -1]), (A,), None),
        "squeeze": (lambda x: mb.squeeze(x=x, axes=[0]), (IMAGE,), None),
        "squeeze_all": (lambda x: mb.squeeze(x=x), (IMAGE,), None),
        "transpose": (lambda x: mb.transpose(x=x, perm=[2, 0, -2]), (A,), None),
        "concat": (
            lambda x, y: mb.concat(values=[x, y], axis=-1),
            (A, B),
            lambda a, b: np.concatenate([a, b], -1),
        ),
        "interleave": (
            lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True),
            (A, B),
            interleaved,
        ),
        "stack": (
            lambda x, y: mb.stack(values=[x, y], axis=-1),
            (A, B),
            lambda a, b: np.stack([a, b], -1),
        ),
        "split_equal": (lambda x: mb.split(x=x, num_splits=2, axis=2), (A,), None),
        "split_sizes": (lambda x: mb.split(x=x, split_sizes=[1, 3], axis=-1), (A,), None),
        "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 3]), (A,), None),
        "pad": (lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], constant_val=1.5), (A,), None),
        "pad_reflect": (lambda x: mb.pad(x=x, pad=[1, 2, 3, 0], mode="reflect"), (A,), None),
        "pad_replicate": (lambda x: mb.pad(x=x, pad=[1, 2, 5, 0], mode="replicate"), (A,), None),
        "band_lower": (lambda x: mb.band_part(x=x, lower=1, upper=0), (M,), None),
        "band_upper": (lambda x: mb.band_part(x=x, lower=-1, upper=2), (M,), None),
        "shape": (lambda x: mb.shape(x=x), (A,), None),
        "fill": (lambda: mb.fill(shape=[2, 3], value=2.5), (), None),
        "fill_like": (
            lambda x: mb.fill_like(ref_tensor=x, value=7),
            (A,),
            lambda x: np.full(x.shape, 7),
        ),
        "range_int": (lambda: mb.range_1d(start=2, end=11, step=3), (), None),
        "range_float": (lambda: mb.range_1d(start=0.5, end=2.4, step=0.5), (), None),
        "one_hot_last": (onehot(-1), (classes,), lambda x: hot),
        "one_hot_first": (onehot(0), (classes,), lambda x: np.moveaxis(hot, -1, 0)),
        "reverse": (lambda x: mb.reverse(x=x, axes=[0, 2]), (A,), None),
        "flatten2d": (lambda x: mb.flatten2d(x=x, axis=2), (A,), None),
    }


def _indices() -> dict[str, Any]:
    ids = np.array([[2, 0], [-1, 1]], np.int32)
    along = RNG.integers(-3, 3, (2, 5, 4)).astype(np.int32)
    pairs = np.array([[0, 1], [1, -1]], np.int32)
    batched = np.array([[3, 0], [1, -4]], np.int32)
    rows = np.array([[2], [0]], np.int32)
    cases: dict[str, Any] = {
        "gather": (lambda x, i: mb.gather(x=x, indices=i, axis=1), (A, ids), None),
        "gather_negative_axis": (lambda x, i: mb.gather(x=x, indices=i, axis=-1), (A, ids), None),
        "gather_scalar": (lambda x: mb.gather(x=x, indices=-2, axis=0), (A,), None),
        "gather_element": (lambda x: mb.gather(x=x, indices=2, axis=0), (VECTOR,), None),
        "gather_batch": (
            lambda x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
            (A, batched),
            None,
        ),
        "gather_along_axis": (
            lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
            (A, along),
            None,
        ),
        "gather_nd": (
            lambda x, i: mb.gather_nd(x=x, indices=i),
            (A, pairs),
            lambda x, i: x[i[:, 0], i[:, 1]],
        ),
        "gather_nd_batch": (
            lambda x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
            (A, rows),
            lambda x, i: x[[0, 1], i[:, 0]],
        ),
    }
    places = np.array([2, 0], np.int32)
    updates = RNG.uniform(0.5, 2, (2, 2, 4)).astype(np.float32)
    functions = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
        "min": np.minimum, "max": np.maximum, "update": lambda old, new: new,
    }  # fmt: skip

    def scattered(mode: str) -> Any:
        def apply(x: np.ndarray, i: np.ndarray, u: np.ndarray) -> np.ndarray:
            result = x.copy()
            for at, place in enumerate(i):
                result[:, place] = functions[mode](result[:, place], u[:, at])
            return result

        return apply

    for mode in functions:
        cases[f"scatter_{mode}"] = (
            lambda x, i, u, mode=mode: mb.scatter(data=x, indices=i, updates=u, axis=1, mode=mode),
            (A, places, updates),
            scattered(mode),
        )
    cases["scatter_twice"] = (
        lambda x, i, u: mb.scatter(data=x, indices=i, updates=u, axis=1, mode="add"),
        (A, np.array([1, 1], np.int32), updates),
        scattered("add"),
    )
    cases["scatter_along_axis"] = (
        lambda x, i, u: mb.scatter_along_axis(data=x, indices=i, updates=u, axis=1, mode="update"),
        (A, np.array([[[2, 0, 1, 0]]] * 2, np.int32), updates[:, :1]),
        None,
    )
    cases["scatter_nd"] = (
        lambda x, i, u: mb.scatter_nd(data=x, indices=i, updates=u, mode="update"),
        (A, np.array([[0, 2], [1, 0]], np.int32), updates[0]),
        lambda x, i, u: _scatter_nd(x, i, u),
    )
    return cases


def _scatter_nd(x: np.ndarray, i: np.ndarray, u: np.ndarray) -> np.ndarray:
    result = x.copy()
    for row, update in zip(i, u, strict=True):
        result[tuple(row)] = update
    return result


def _reductions() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for name in (
        "sum",
        "mean",
        "max",
        "min",
        "prod",
        "sum_square",
        "l1_norm",
        "l2_norm",
        "log_sum_exp",
    ):
        function = getattr(mb, f"reduce_{name}")
        cases[f"{name}_keep"] = (
            lambda x, f=function: f(x=x, axes=[1, -1], keep_dims=True), (A,), None)  # fmt: skip
        cases[f"{name}_drop"] = (
            lambda x, f=function: f(x=x, axes=[0], keep_dims=False), (A,), None)  # fmt: skip
        cases[f"{name}_all"] = (lambda x, f=function: f(x=x), (A,), None)
    for name in ("sum", "max", "min", "mean", "sum_square"):
        function = getattr(mb, f"reduce_{name}")
        cases[f"{name}_int"] = (lambda x, f=function: f(x=x, axes=[2]), (N,), None)
    cases["log_sum"] = (lambda x: mb.reduce_log_sum(x=x, axes=[1]), (abs(A),), None)
    ties = np.array([[1, 3, 3], [2, 2, 0]], np.float32)
    for name in ("argmax", "argmin"):
        function = getattr(mb, f"reduce_{name}")
        cases[name] = (lambda x, f=function: f(x=x, axis=1), (ties,), None)
        cases[f"{name}_keep"] = (lambda x, f=function: f(x=x, axis=0, keep_dims=True), (A,), None)
    cases["topk"] = (lambda x: mb.topk(x=x, k=2, axis=1), (A,), None)
    cases["topk_ascending"] = (lambda x: mb.topk(x=x, k=3, axis=-1, ascending=True), (A,), None)
    cases["topk_values"] = (
        lambda x: mb.topk(x=x, k=1, axis=-1, return_indices=False), (A,),
        lambda x: x.max(-1, keepdims=True),
    )  # fmt: skip
    cases["argsort"] = (lambda x: mb.argsort(x=x, axis=1), (A,), None)
    cases["cumsum"] = (lambda x: mb.cumsum(x=x, axis=1), (A,), None)
    cases["cumsum_reverse"] = (lambda x: mb.cumsum(x=x, axis=2, reverse=True), (A,), None)
    cases["cumsum_int"] = (lambda x: mb.cumsum(x=x, axis=0), (N,), None)
    cases["cumsum_exclusive"] = (
        lambda x: mb.cumsum(x=x, axis=1, exclusive=True),
        (A,),
        lambda x: np.cumsum(x, 1) - x,
    )
    return cases


CASES = {**_shapes(), **_indices(), **_reductions()}


@pytest.fixture(scope="module")
def outcomes(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = [harness.Case(name, *case) for name, case in CASES.items()]
    return harness.run_cases(cases, tmp_path_factory.mktemp("ops") / "model.mlpackage")


@pytest.mark.parametrize("name", CASES)
def test_equals_value_inference(name: str, outcomes: Any, harness: Any) -> None:
    harness.check(outcomes[name], rtol=1e-5, atol=5e-6)


OLD_CASES = {
    "gather": (
        lambda x: mb.gather(x=x, indices=np.array([[2, 0], [1, 1]], np.int32), axis=1),
        (A,),
        None,
    ),
    "topk": (lambda x: mb.topk(x=x, k=2, axis=1), (A,), None),
    "argmax": (lambda x: mb.reduce_argmax(x=x, axis=1), (A,), None),
    "reshape": (lambda x: mb.reshape(x=x, shape=[0, -1, 2]), (A,), None),
    "slice": (lambda x: mb.slice_by_index(x=x, begin=[0, 1, 0], end=[2, 3, 4]), (A,), None),
}


@pytest.mark.parametrize("name", OLD_CASES)
def test_older_opsets(
    name: str, harness: Any, tmp_path_factory: pytest.TempPathFactory, old_outcomes: Any
) -> None:
    harness.check(old_outcomes[name])


@pytest.fixture(scope="module")
def old_outcomes(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = [harness.Case(name, *case) for name, case in OLD_CASES.items()]
    path = tmp_path_factory.mktemp("old") / "model.mlpackage"
    return harness.run_cases(cases, path, ct.target.iOS16)


def test_wrong_index_is_refused(load_program: Any) -> None:
    from llm_coreml.errors import ArtifactError

    program = load_program(
        {
            "x": mb.placeholder(shape=(4,)),
            "i": mb.placeholder(shape=(2,), dtype=ct.converters.mil.mil.types.int32),
        },
        lambda v: [mb.gather(x=v["x"], indices=v["i"], axis=0, validate_indices=False)],
    )
    data = torch.arange(4.0)
    assert program({"x": data, "i": torch.tensor([-1, 3], dtype=torch.int32)})[
        "out_0"
    ].tolist() == [3, 3]
    with pytest.raises(ArtifactError, match="index 4 of 4"):
        program({"x": data, "i": torch.tensor([0, 4], dtype=torch.int32)})


def test_competing_updates_are_refused(load_program: Any) -> None:
    from llm_coreml.errors import ArtifactError

    program = load_program(
        {"x": mb.placeholder(shape=(4,)), "u": mb.placeholder(shape=(2,))},
        lambda v: [mb.scatter(data=v["x"], indices=[1, 1], updates=v["u"], axis=0, mode="update")],
    )
    with pytest.raises(ArtifactError, match="which update wins"):
        program({"x": torch.zeros(4), "u": torch.ones(2)})
