"""Products, attention, convolution, normalization and quantization of values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb

from llm_coreml.reference.ops import attention

RNG = np.random.default_rng(1)
A = RNG.standard_normal((2, 3, 4)).astype(np.float32)
B = RNG.standard_normal((2, 3, 4)).astype(np.float32)
N = RNG.integers(-9, 9, (2, 3, 4)).astype(np.int32)
IMAGE = RNG.standard_normal((1, 4, 5, 6)).astype(np.float32)
KERNEL = RNG.standard_normal((6, 2, 3, 2)).astype(np.float32)
VECTOR = RNG.standard_normal((4,)).astype(np.float32)


def _products() -> dict[str, Any]:
    weight = RNG.standard_normal((6, 4)).astype(np.float32)
    bias = RNG.standard_normal((6,)).astype(np.float32)
    left = RNG.standard_normal((1, 3, 2, 4)).astype(np.float32)
    right = RNG.standard_normal((1, 4, 2, 5)).astype(np.float32)
    q, k, v = (
        RNG.standard_normal((1, 2, s, e)).astype(np.float32) for s, e in ((3, 4), (5, 4), (5, 6))
    )
    mask = RNG.standard_normal((3, 5)).astype(np.float32)
    allowed = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).astype(bool)

    def attend() -> Any:
        return lambda q, k, v, m=None: mb.scaled_dot_product_attention(
            query=q, key=k, value=v, **({} if m is None else {"attn_mask": m})
        )

    def expected_conv(**settings: Any) -> Any:
        return lambda x: torch.nn.functional.conv2d(
            torch.from_numpy(x), torch.from_numpy(KERNEL), torch.from_numpy(bias), **settings
        ).numpy()

    def same(x: np.ndarray) -> Any:
        return expected_conv(groups=2)(np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 1))))

    def conv(**settings: Any) -> Any:
        return lambda x: mb.conv(x=x, weight=KERNEL, bias=bias, groups=2, **settings)

    return {
        "linear": (lambda x: mb.linear(x=x, weight=weight, bias=bias), (A,), None),
        "linear_plain": (lambda x: mb.linear(x=x, weight=weight), (A,), lambda x: x @ weight.T),
        "matmul": (lambda x, y: mb.matmul(x=x, y=y, transpose_y=True), (A, B), None),
        "matmul_both": (lambda x, y: mb.matmul(x=x, y=y, transpose_x=True), (A, B), None),
        "einsum": (
            lambda x, y: mb.einsum(values=(x, y), equation="abcd,adce->abce"), (left, right),
            lambda x, y: np.einsum("abcd,adce->abce", x, y),
        ),
        "attention": (attend(), (q, k, v), None),
        "attention_float": (attend(), (q, k, v, mask), None),
        "attention_bool": (attend(), (q, k, v, allowed), None),
        "conv": (conv(), (IMAGE,), expected_conv(groups=2)),
        "conv_custom": (
            conv(pad_type="custom", pad=[2, 2, 1, 1], strides=[2, 1], dilations=[1, 2]), (IMAGE,),
            expected_conv(groups=2, padding=(2, 1), stride=(2, 1), dilation=(1, 2)),
        ),
        "conv_same": (conv(pad_type="same"), (IMAGE,), same),
        "conv_1x1": (
            lambda x: mb.conv(x=x, weight=weight[:, :, None, None]), (IMAGE,),
            lambda x: np.einsum("oc,nchw->nohw", weight, x),
        ),
        "conv_1d": (
            lambda x: mb.conv(x=x, weight=weight[:, :3, None]), (A,),
            lambda x: np.einsum("oc,ncw->now", weight[:, :3], x),
        ),
    }  # fmt: skip


def _normalized() -> dict[str, Any]:
    return {
        "layer_norm": (
            lambda x: mb.layer_norm(x=x, axes=[-1], gamma=VECTOR, beta=VECTOR, epsilon=1e-3),
            (A,), None,
        ),
        "layer_norm_all": (lambda x: mb.layer_norm(x=x, axes=[1, 2]), (A,), None),
        "l2_norm": (lambda x: mb.l2_norm(x=x, epsilon=1e-3), (IMAGE,), None),
        "l2_norm_3": (lambda x: mb.l2_norm(x=x), (A,), None),
        "batch_norm": (
            lambda x: mb.batch_norm(
                x=x, mean=VECTOR, variance=abs(VECTOR), gamma=VECTOR, beta=VECTOR),
            (IMAGE,),
            lambda x: torch.nn.functional.batch_norm(
                torch.from_numpy(x),
                *(torch.from_numpy(p) for p in (VECTOR, abs(VECTOR), VECTOR, VECTOR)),
            ).numpy(),
        ),
        "instance_norm": (
            lambda x: mb.instance_norm(x=x), (IMAGE,),
            lambda x: torch.nn.functional.instance_norm(torch.from_numpy(x)).numpy(),
        ),
        "quantize": (
            lambda x: mb.quantize(
                input=x, scale=np.float32(0.1), zero_point=np.int8(3), output_dtype="int8"),
            (A * 9,), None,
        ),
        "quantize_axis": (
            lambda x: mb.quantize(
                input=x, scale=np.array([0.1, 0.2, 0.3], np.float32),
                zero_point=np.array([3, 4, 200], np.uint8), axis=1, output_dtype="uint8"),
            (A * 9,), None,
        ),
        "dequantize": (
            lambda x: mb.dequantize(
                input=mb.cast(x=x, dtype="int8"), scale=np.array([0.1, 0.2, 0.3], np.float32),
                zero_point=np.array([3, 4, -5], np.int8), axis=1),
            (N,),
            lambda x: (x - np.array([[3], [4], [-5]])) * np.float32([[0.1], [0.2], [0.3]]),
        ),
    }  # fmt: skip


CASES = {**_products(), **_normalized()}


@pytest.fixture(scope="module")
def outcomes(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = [harness.Case(name, *case) for name, case in CASES.items()]
    return harness.run_cases(cases, tmp_path_factory.mktemp("ops") / "model.mlpackage")


@pytest.mark.parametrize("name", CASES)
def test_equals_value_inference(name: str, outcomes: Any, harness: Any) -> None:
    harness.check(outcomes[name], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_both_ways_of_attention_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(1, 2, rows, 8) for rows in (5, 7, 7))
    mask = {"none": None, "bool": torch.rand(5, 7) > 0.3, "float": torch.randn(5, 7)}[kind]
    few = attention.scaled_dot_product_attention(query, key, value, mask)
    monkeypatch.setattr(attention, "_FEW_ROWS", 0)
    many = attention.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(few, many, equal_nan=True)


@pytest.mark.parametrize("limit", [0, 16])
def test_attention_row_without_keys_is_nan(
    limit: int, load_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_FEW_ROWS", limit)
    shape = (1, 1, 2, 4)
    program = load_program(
        {name: mb.placeholder(shape=shape) for name in ("q", "k", "v")},
        lambda v: [
            mb.scaled_dot_product_attention(
                query=v["q"], key=v["k"], value=v["v"],
                attn_mask=np.array([[True, False], [False, False]]),
            )
        ],
    )  # fmt: skip
    data = {name: torch.randn(shape) for name in ("q", "k", "v")}
    result = program(data)["out_0"]
    torch.testing.assert_close(result[0, 0, 0], data["v"][0, 0, 0])
    assert result[0, 0, 1].isnan().all()


@pytest.mark.parametrize("masked", [-np.inf, -40000.0, -1e9])
@pytest.mark.parametrize(("rows", "start", "keys"), [(40, 0, 1100), (700, 300, 2100), (20, 1, 513)])
def test_keys_that_no_row_sees_are_left_out_without_a_trace(
    rows: int, start: int, keys: int, masked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 2, n, 16, generator=drawn) for n in (rows, keys, keys))
    ahead = torch.arange(keys) > torch.arange(start, start + rows).unsqueeze(1)
    mask = torch.zeros(rows, keys).masked_fill(ahead, masked).expand(1, 1, rows, keys)
    looked_at: list[int] = []
    kernel = attention.F.scaled_dot_product_attention

    def counted(q: torch.Tensor, k: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        looked_at.append(k.shape[-2])
        return kernel(q, k, *rest)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counted)
    found = attention.scaled_dot_product_attention(query, key, value, mask)
    assert looked_at == [-(-(start + rows) // 512) * 512]
    assert torch.equal(found, kernel(query, key, value, mask))
    # What would be seen in the result is looked at: a number that is none, scores beyond the mask,
    # and a row that sees nothing else.
    last = value.clone()
    last[..., -1, 0] = torch.inf
    attention.scaled_dot_product_attention(query, key, last, mask)
    far = key.clone()
    far[..., -1, :] = torch.inf if masked == -np.inf else -masked
    attention.scaled_dot_product_attention(1000 * query, far, value, mask)
    blind = mask.clone()
    blind[..., 0, :] = masked
    attention.scaled_dot_product_attention(query, key, value, blind)
    assert looked_at[1:] == [keys] * 3
