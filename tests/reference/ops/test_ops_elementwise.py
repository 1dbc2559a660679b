from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4)).astype(np.float32)
Y = RNG.standard_normal((4,)).astype(np.float32)
UNIT = RNG.uniform(-0.9, 0.9, (3, 4)).astype(np.float32)
POSITIVE = RNG.uniform(0.1, 3, (3, 4)).astype(np.float32)
HALVES = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.0], np.float32)
INTS = RNG.integers(-9, 9, (3, 4)).astype(np.int32)
J = np.array([-3, -2, 2, 5], np.int32)
P = RNG.integers(0, 2, (3, 4)).astype(bool)
Q = np.array([True, False, True, False])


def _unary() -> dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...], Any]]:
    cases: dict[str, Any] = {}
    for name in ("acos", "asin", "atan", "atanh", "cos", "cosh", "erf", "exp", "sin", "sinh"):
        cases[name] = (getattr(mb, name), (UNIT,), None)
    for name in ("tan", "tanh", "abs", "sign", "exp2", "square", "relu", "relu6", "sigmoid"):
        cases[name] = (getattr(mb, name), (X,), None)
    for name in ("ceil", "floor", "round", "softsign", "softplus"):
        cases[name] = (getattr(mb, name), (HALVES,), None)
    for name in ("abs", "sign", "square"):
        cases[f"{name}_int"] = (getattr(mb, name), (INTS,), None)
    for name in ("sqrt", "log", "rsqrt", "inverse"):
        cases[name] = (getattr(mb, name), (POSITIVE,), None)
    for name in ("log", "rsqrt", "inverse"):
        function = getattr(mb, name)
        cases[f"{name}_epsilon"] = (lambda x, f=function: f(x=x, epsilon=0.25), (POSITIVE,), None)
    return {key: (lambda x, f=f: f(x=x), a, e) for key, (f, a, e) in cases.items()}


def _binary() -> dict[str, Any]:
    cases: dict[str, Any] = {}
    arithmetic = ("add", "sub", "mul", "maximum", "minimum", "floor_div", "mod")
    compare = ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")
    for name in (*arithmetic, *compare):
        function = getattr(mb, name)
        cases[name] = (lambda x, y, f=function: f(x=x, y=y), (X, Y), None)
        cases[f"{name}_int"] = (lambda x, y, f=function: f(x=x, y=y), (INTS, J), None)
    for name in ("logical_and", "logical_or", "logical_xor"):
        function = getattr(mb, name)
        cases[name] = (lambda x, y, f=function: f(x=x, y=y), (P, Q), None)
    cases["real_div"] = (lambda x, y: mb.real_div(x=x, y=y), (X, Y), None)
    cases["pow"] = (lambda x, y: mb.pow(x=x, y=y), (POSITIVE, Y), None)
    cases["pow_int"] = (
        lambda x, y: mb.pow(x=x, y=y),
        (INTS, np.array([2, 3, 0, 1], np.int32)),
        None,
    )
    return cases


def _others() -> dict[str, Any]:
    where = lambda c, a, b: np.where(c, a, b)  # noqa: E731
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    return {
        "logical_not": (lambda x: mb.logical_not(x=x), (P,), None),
        "select": (lambda c, a, b: mb.select(cond=c, a=a, b=b), (P, X, UNIT), where),
        "select_int": (lambda c, a, b: mb.select(cond=c, a=a, b=b), (P, INTS, INTS * 2), where),
        "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.25), (X,), None),
        "threshold": (lambda x: mb.threshold(x=x, alpha=0.25), (X,), None),
        "identity": (lambda x: mb.identity(x=x), (X,), None),
        "cast_down": (lambda x: mb.cast(x=x, dtype="int32"), (X * 3,), None),
        "cast_up": (lambda x: mb.cast(x=x, dtype="fp32"), (INTS,), None),
        "cast_bool": (lambda x: mb.cast(x=x, dtype="bool"), (INTS,), None),
        "cast_from_bool": (lambda x: mb.cast(x=x, dtype="fp32"), (P,), None),
        "cast_int8": (lambda x: mb.cast(x=x, dtype="int8"), (INTS,), None),
        "cast_uint16": (lambda x: mb.cast(x=x, dtype="uint16"), (abs(INTS) * 5000,), None),
        "cast_half": (lambda x: mb.cast(x=x, dtype="fp16"), (X * 1e4,), None),
        "silu": (lambda x: mb.silu(x=x), (X,), silu),
        "softmax": (lambda x: mb.softmax(x=x, axis=0), (X,), None),
        "gelu": (lambda x: mb.gelu(x=x), (X,), None),
        "gelu_tanh": (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), (X,), None),
        "gelu_sigmoid": (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), (X,), None),
        "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.1), (X,), None),
        "elu": (lambda x: mb.elu(x=x, alpha=0.3), (X,), None),
        "linear_activation": (lambda x: mb.linear_activation(x=x, alpha=2.0, beta=1.0), (X,), None),
        "clamped_relu": (lambda x: mb.clamped_relu(x=x, alpha=0.5, beta=0.6), (X,), None),
        "scaled_tanh": (lambda x: mb.scaled_tanh(x=x, alpha=0.5, beta=0.6), (X,), None),
        "sigmoid_hard": (lambda x: mb.sigmoid_hard(x=x, alpha=0.5, beta=0.6), (X,), None),
        "prelu": (
            lambda x: mb.prelu(x=x, alpha=np.array([0.1, 0.2, 0.3], np.float32)),
            (RNG.standard_normal((2, 3, 2, 2)).astype(np.float32),),
            None,
        ),
        "thresholded_relu": (
            lambda x: mb.thresholded_relu(x=x, alpha=0.5),
            (X,),
            lambda x: np.where(x >= 0.5, x, 0),
        ),
    }


CASES = {**_unary(), **_binary(), **_others()}


@pytest.fixture(scope="module")
def outcomes(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = [harness.Case(name, *case) for name, case in CASES.items()]
    return harness.run_cases(cases, tmp_path_factory.mktemp("ops") / "model.mlpackage")


@pytest.mark.parametrize("name", CASES)
def test_equals_value_inference(name: str, outcomes: Any, harness: Any) -> None:
    harness.check(outcomes[name], rtol=5e-6, atol=2e-6)


def test_integers_stay_integers(outcomes: Any) -> None:
    assert outcomes["floor_div_int"].actual[0].dtype == np.int32
    np.testing.assert_array_equal(outcomes["floor_div_int"].actual[0], INTS // J)
    np.testing.assert_array_equal(outcomes["mod_int"].actual[0], INTS % J)


def test_cast_out_of_range_is_refused(load_program: Any) -> None:
    from llm_coreml.errors import ArtifactError

    program = load_program(
        {"x": mb.placeholder(shape=(2,))}, lambda v: [mb.cast(x=v["x"], dtype="int32")]
    )
    assert program({"x": torch.tensor([-1.9, 2147483520.0])})["out_0"].tolist() == [-1, 2147483520]
    for bad in (float("inf"), float("nan"), 2147483648.0):
        with pytest.raises(ArtifactError, match=r"\(cast\) .*does not fit int32"):
            program({"x": torch.tensor([0.0, bad])})
