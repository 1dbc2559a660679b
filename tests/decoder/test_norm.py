"""RMSNorm by the row's largest magnitude: the textbook's values, and finite in fp16."""

from __future__ import annotations

import contextlib
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from llm_coreml.decoder.norm import LayerNorm, RMSNorm
from llm_coreml.targets import NormForm

# Ten fp16 operations of relative error 2^-11 each, the last two on values near one.
FP16_BOUND = 2.0**-8
FORMS = get_args(NormForm)


def textbook(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.to(torch.float64)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.to(torch.float64)


def norm_with(
    size: int, eps: float, seed: int, dtype: torch.dtype, form: NormForm = "scaled"
) -> RMSNorm:
    norm = RMSNorm(size, eps)
    norm.take(form, dtype)
    norm = norm.to(dtype)
    # Made in fp32; here each precision gets the best numbers it can hold.
    norm.root_eps = torch.tensor([math.sqrt(eps)], dtype=dtype)
    if norm.form == "l2":
        norm.grow = torch.tensor([1 / (float(norm.shrink) * math.sqrt(size))], dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    norm.weight.copy_(1 + 0.2 * torch.randn(size, generator=generator))
    return norm


def rows_of(size: int, scale: float, seed: int) -> torch.Tensor:
    """Normal rows, a row with one outlier and a constant row, all up to `scale`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, size, generator=generator, dtype=torch.float64)
    rows[1] *= 0.01
    rows[1, 0] = -1
    rows[2] = 1
    return rows / rows.abs().amax(dim=-1, keepdim=True) * scale


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.floats(math.log(1e-6), math.log(6e4)),
    eps=st.sampled_from([1e-5, 1e-6, 1e-8]),
    size=st.integers(1, 70),
    seed=st.integers(0, 1000),
    form=st.sampled_from(FORMS),
)
def test_is_the_textbook_formula_in_fp64(
    exponent: float, eps: float, size: int, seed: int, form: NormForm
) -> None:
    norm = norm_with(size, eps, seed, torch.float64, form)
    x = rows_of(size, math.exp(exponent), seed)
    expected = textbook(x, norm.weight, eps)
    # The mean of [x, -x] is zero but for what its sum was rounded by.
    beside = 1e-15 * expected.abs().amax(dim=-1, keepdim=True) if form == "layer" else 1e-300
    assert ((norm(x) - expected).abs() <= 1e-13 * expected.abs() + beside).all()


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.floats(math.log(1e-3), math.log(6e4)),
    eps=st.sampled_from([1e-5, 1e-6]),
    size=st.sampled_from([16, 64, 576]),
    seed=st.integers(0, 1000),
    form=st.sampled_from(FORMS),
)
def test_stays_near_fp64_step_by_step_in_fp16(
    exponent: float, eps: float, size: int, seed: int, form: NormForm
) -> None:
    norm = norm_with(size, eps, seed, torch.float16, form)
    x = rows_of(size, math.exp(exponent), seed).to(torch.float16)
    found = norm(x)
    assert found.dtype == torch.float16
    # A layer norm has an eps that fp16 holds.
    expected = textbook(x, norm.weight, norm.eps)
    largest = expected.abs().amax(dim=-1, keepdim=True)
    assert torch.isfinite(found).all()
    assert ((found.to(torch.float64) - expected).abs() <= FP16_BOUND * largest).all()


@pytest.mark.parametrize("largest", [256.0, 60000.0, 65504.0])
@pytest.mark.parametrize("form", FORMS)
def test_does_not_overflow_where_the_textbook_does(largest: float, form: NormForm) -> None:
    for size in (64, 2048):
        x = torch.full((1, size), largest, dtype=torch.float16)
        assert torch.isinf((x * x).mean()), "the plain formula overflows here"
        norm = norm_with(size, 1e-5, 0, torch.float16, form)
        # Finite is not enough: an infinite mean square would give zeros.
        assert torch.allclose(norm(x)[0], norm.weight, rtol=FP16_BOUND, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_zero_rows_give_zeros(dtype: torch.dtype, form: NormForm) -> None:
    norm = norm_with(64, 1e-12, 0, dtype, form)
    assert torch.equal(norm(torch.zeros(2, 64, dtype=dtype)), torch.zeros(2, 64, dtype=dtype))


@pytest.mark.parametrize("size", [64, 576, 2048])
@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_stands_beside_a_massive_activation_keeps_its_bits(
    size: int, flushed: bool, form: NormForm
) -> None:
    """Also on a device that takes subnormal numbers for zero."""
    x = rows_of(size, 1.0, seed=0)[:1].half().abs().clamp(min=0.3)
    x[0, 0] = 18_000
    norm = norm_with(size, 1e-5, 0, torch.float16, form)
    expected = textbook(x, norm.weight, 1e-5)
    with _FlushedSubnormals() if flushed else contextlib.nullcontext():
        found = norm(x)
    assert ((found - expected).abs() <= FP16_BOUND * expected.abs()).all()


class _FlushedSubnormals(TorchFunctionMode):
    """Takes every subnormal fp16 number that an operation gives for zero."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float16:
            with torch._C.DisableTorchFunction():
                small = result.abs() < torch.finfo(torch.float16).smallest_normal
                return torch.where(small, torch.zeros_like(result), result)
        return result


def layer_textbook(x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    assert norm.weight is not None and norm.bias is not None
    x, weight, bias = x.double(), norm.weight.double(), norm.bias.double()
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def layer_norm_with(
    size: int, eps: float, dtype: torch.dtype, form: NormForm = "scaled"
) -> LayerNorm:
    norm = LayerNorm(size, eps, bias=True)
    norm.take(form, dtype)
    generator = torch.Generator().manual_seed(0)
    assert norm.weight is not None and norm.bias is not None
    norm.weight.copy_(1 + 0.2 * torch.randn(size, generator=generator))
    norm.bias.copy_(0.2 * torch.randn(size, generator=generator))
    root = torch.tensor([math.sqrt(eps) / 2], dtype=dtype)  # the best that the precision can hold
    norm = norm.to(dtype)
    norm.root_eps = root
    if norm.form == "l2":
        norm.grow = torch.tensor([1 / (float(norm.shrink) * math.sqrt(size))], dtype=dtype)
    return norm


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.floats(math.log(1e-6), math.log(6e4)),
    eps=st.sampled_from([1e-5, 1e-6]),
    size=st.integers(2, 70),
    offset=st.floats(-3, 3),
    form=st.sampled_from(FORMS),
)
def test_layer_norm_is_the_textbook_formula_in_fp64(
    exponent: float, eps: float, size: int, offset: float, form: NormForm
) -> None:
    norm = layer_norm_with(size, eps, torch.float64, form)
    x = (rows_of(size, 1.0, size)[:2] + offset) * math.exp(exponent)
    assert torch.allclose(norm(x), layer_textbook(x, norm), rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.floats(math.log(1e-3), math.log(6e4)),
    eps=st.sampled_from([1e-5, 1e-6]),
    size=st.sampled_from([16, 64, 576]),
    seed=st.integers(0, 1000),
    offset=st.floats(-0.5, 0.5),
    form=st.sampled_from(FORMS),
)
def test_layer_norm_stays_near_fp64_step_by_step_in_fp16(
    exponent: float, eps: float, size: int, seed: int, offset: float, form: NormForm
) -> None:
    norm = layer_norm_with(size, eps, torch.float16, form)
    x = (rows_of(size, 0.5, seed)[:2] + offset).clamp(-1, 1) * math.exp(exponent)
    half = x.to(torch.float16)
    found, expected = norm(half), layer_textbook(half, norm)
    assert torch.isfinite(found).all()
    largest = expected.abs().amax(dim=-1, keepdim=True)
    assert ((found.double() - expected).abs() <= 2 * FP16_BOUND * largest).all()


def test_what_differs_by_more_than_fp16_holds_has_a_mean() -> None:
    x = torch.full((1, 64), 65504.0, dtype=torch.float16)
    x[0, 1::2] = -65504.0
    norm = layer_norm_with(64, 1e-5, torch.float16)
    assert torch.allclose(norm(x).double(), layer_textbook(x, norm), rtol=2 * FP16_BOUND, atol=0.01)
