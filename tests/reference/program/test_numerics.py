"""The modes of execution: where they round, and that running on fp16 tensors changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb

from llm_coreml.errors import ConfigError
from llm_coreml.reference import Execution, load
from llm_coreml.reference.ops import OPS, STRICT_OPS
from llm_coreml.reference.ops.strict import multiply
from op_examples import EXAMPLES
from single_op import build

EVERY_HALF = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
ARITHMETIC = sorted(name for name, spec in OPS.items() if spec.half and not spec.exact)
UNARY = ("abs", "ceil", "floor", "relu", "relu6", "round", "sign")
BINARY = ("add", "sub", "mul", "real_div", "maximum", "minimum")


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equal values, NaN equal to NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_every_arithmetic_on_halves_is_compared_below() -> None:
    assert sorted({"cast", *BINARY} - {"maximum", "minimum"}) == ARITHMETIC


@pytest.mark.parametrize("name", UNARY)
def test_unary_on_halves_equals_rounding_once(name: str) -> None:
    function = OPS[name].function
    same_bits(function(x=EVERY_HALF), function(x=EVERY_HALF.float()).half())


@pytest.mark.parametrize("name", BINARY)
def test_binary_on_halves_equals_rounding_once(name: str) -> None:
    function = OPS[name].function
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        other = EVERY_HALF[torch.randperm(1 << 16, generator=generator)]
        exact = function(x=EVERY_HALF.float(), y=other.float()).half()
        same_bits(function(x=EVERY_HALF, y=other), exact)
    # Odd lengths take the scalar tail of torch's kernels.
    for length in (1, 3, 7, 17):
        x, y = EVERY_HALF[1000 : 1000 + length], EVERY_HALF[20000 : 20000 + length]
        same_bits(function(x=x, y=y), function(x=x.float(), y=y.float()).half())


def halved(value: Any) -> Any:
    """Return fp32 arrays as fp16, lists included."""
    if isinstance(value, (list, tuple)):
        return [halved(item) for item in value]
    if isinstance(value, float):
        return np.float16(value)
    is_single = isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float32
    return value.astype(np.float16) if is_single else value


def as_half(value: Any) -> Any:
    """Return fp32 tensors as fp16, lists included."""
    if isinstance(value, list):
        return [as_half(item) for item in value]
    is_single = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.half() if is_single else value


EXACT = sorted(
    name
    for name, arguments in EXAMPLES.items()
    if OPS[name].exact and OPS[name].half and not name.startswith("constexpr_")
)


@pytest.mark.parametrize("name", EXACT)
def test_exact_operations_copy_halves(name: str) -> None:
    """Run on fp16 tensors, or on fp32 tensors of fp16 values: the same, and nothing to round."""
    arguments = {key: halved(value) for key, value in EXAMPLES[name].items()}
    function, given = build(name, **arguments).call(dynamic=False)
    wide = function(**given)
    half = function(**{key: as_half(value) for key, value in given.items()})
    several = isinstance(wide, (tuple, list))
    for expected, actual in zip(*((wide, half) if several else ([wide], [half])), strict=True):
        same_bits(actual.to(expected.dtype), expected)
        if expected.dtype == torch.float32:
            same_bits(expected.half().float(), expected)


def chain(variables: dict[str, Any]) -> list[Any]:
    x = mb.cast(x=variables["x"], dtype="fp16")
    grown = mb.mul(x=x, y=np.float16(300))
    return [
        mb.mul(x=grown, y=np.float16(0.01)),
        mb.add(x=x, y=np.float16(0.1)),
    ]


def test_fp32_rounds_nothing_and_declared_rounds_each_value(
    load_program: Any, tmp_path: Any
) -> None:
    load_program({"x": mb.placeholder(shape=(3,))}, chain)
    given = torch.tensor([0.3, 1.0, 300.0])
    tenth, hundredth = float(np.float16(0.1)), float(np.float16(0.01))
    exact = load(tmp_path / "model.mlpackage", execution=Execution(mode="fp32"))(x=given)
    torch.testing.assert_close(exact["out_0"], given * 300 * hundredth, rtol=1e-6, atol=0)
    torch.testing.assert_close(exact["out_1"], given + tenth, rtol=1e-6, atol=0)
    rounded = load(tmp_path / "model.mlpackage")(x=given)
    assert rounded["out_0"].dtype == torch.float16
    assert rounded["out_0"][2].isinf()
    expected = (given.half().float() + tenth).half()
    torch.testing.assert_close(rounded["out_1"], expected, rtol=0, atol=0)


def test_strict_sums_in_fp16(load_program: Any, tmp_path: Any) -> None:
    # 2048 ones and then ones: an fp16 sum stops at 2048, an fp32 sum does not.
    ones = np.ones((1, 4096), np.float16)
    load_program(
        {"x": mb.placeholder(shape=(1, 4096))},
        lambda v: [mb.linear(x=mb.cast(x=v["x"], dtype="fp16"), weight=ones)],
    )
    given = torch.ones(1, 4096)
    results = {
        mode: load(tmp_path / "model.mlpackage", execution=Execution(mode=mode))(x=given)["out_0"]
        for mode in ("declared", "fp32", "strict-fp16")
    }
    assert results["declared"].item() == results["fp32"].item() == 4096
    assert results["strict-fp16"].item() == 2048


def test_strict_product_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(2, *shape, generator=generator).half().float() for shape in ((3, 5), (5, 4))
    )
    expected = np.zeros((2, 3, 4), np.float16)
    for place in range(5):
        product = x.numpy()[:, :, place, None] * y.numpy()[:, None, place, :]
        expected = (expected.astype(np.float32) + product).astype(np.float16)
    same_bits(multiply(x, y), torch.from_numpy(expected.astype(np.float32)))


PRODUCTS: dict[str, Any] = {
    "linear": dict(x=(2, 3, 8), weight=(5, 8), bias=(5,)),
    "matmul": dict(x=(2, 3, 8), y=(2, 8, 4)),
    "einsum": dict(values=((1, 3, 2, 8), (1, 8, 2, 5)), equation="abcd,adce->abce"),
    "conv": dict(x=(1, 6, 5, 4), weight=(4, 3, 2, 3), bias=(4,), groups=2, pad_type="same"),
    "scaled_dot_product_attention": dict(query=(1, 2, 3, 8), key=(1, 2, 5, 8), value=(1, 2, 5, 8)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_strict_products_stay_near_the_declared_ones(name: str) -> None:
    generator = torch.Generator().manual_seed(2)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half().float()

    given = {
        key: tensor(value)
        if isinstance(value, tuple) and isinstance(value[0], int)
        else [tensor(shape) for shape in value]
        if isinstance(value, tuple)
        else value
        for key, value in PRODUCTS[name].items()
    }
    plain = OPS[name].function(**given)
    strict = STRICT_OPS[name].function(**given, declared="fp16")
    # Each of at most 18 sums, none above 16, rounds by at most half a unit in the last place.
    assert (strict - plain).abs().max() <= 18 * 16 * 2**-11
    assert not torch.equal(strict, plain)
    same_bits(STRICT_OPS[name].function(**given, declared="fp32"), plain)


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no numerics mode 'fp8'.*strict-fp16"):
        Execution(mode="fp8").pool()
    with pytest.raises(ConfigError, match="'abacus' cannot be used here"):
        Execution(device="abacus").pool()
