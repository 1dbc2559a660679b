"""Pooling, transposed convolution, and moves between space, channels and batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops import linear, normalization, spatial
from single_op import build, close, evaluate

RNG = np.random.default_rng(3)


def image(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def pooled(
    x: np.ndarray, kind: str, sizes: list[int], steps: list[int], pads: list[int], out: list[int]
) -> np.ndarray:
    """Pool by visiting every window; mean counts the padding, mean_inside does not."""
    result = np.zeros((*x.shape[:2], *out), np.float32)
    for place in itertools.product(*map(range, out)):
        inside, declared = [], 1
        for axis, at in enumerate(place):
            low = at * steps[axis] - pads[2 * axis]
            high = low + sizes[axis]
            length = x.shape[2 + axis]
            inside.append(slice(max(low, 0), min(high, length)))
            declared *= min(high, length + pads[2 * axis + 1]) - low
        window = x[(slice(None), slice(None), *inside)].reshape(*x.shape[:2], -1)
        result[(slice(None), slice(None), *place)] = {
            "max": lambda w, n: w.max(-1),
            "l2": lambda w, n: np.sqrt((w**2).sum(-1)),
            "mean": lambda w, n: w.sum(-1) / n,
            "mean_inside": lambda w, n: w.mean(-1),
        }[kind](window, declared)
    return result


LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any], list[int]]] = {
    "1d": ((2, 3, 9), {"kernel_sizes": [3], "pad_type": "valid", "strides": [2]}, [0, 0]),
    "plain": ((1, 2, 5, 6), {"kernel_sizes": [2, 3], "pad_type": "valid"}, [0] * 4),
    "custom": (
        (1, 2, 5, 6),
        {"kernel_sizes": [3, 4], "pad_type": "custom", "pad": [1, 0, 2, 1], "strides": [2, 1]},
        [1, 0, 2, 1],
    ),
    "same": (
        (1, 2, 5, 7),
        {"kernel_sizes": [3, 2], "pad_type": "same", "strides": [2, 2]},
        [1, 1, 0, 1],
    ),
    "lower": (
        (1, 2, 5, 7),
        {"kernel_sizes": [3, 2], "pad_type": "same_lower", "strides": [2, 2]},
        [1, 1, 1, 0],
    ),
    "up": (
        (1, 2, 6, 5),
        {"kernel_sizes": [3, 2], "pad_type": "valid", "strides": [2, 2], "ceil_mode": True},
        [0] * 4,
    ),
    "up_padded": (
        (1, 2, 6, 7),
        {
            "kernel_sizes": [3, 2], "pad_type": "custom", "strides": [2, 3], "ceil_mode": True,
            "pad": [1, 1, 1, 1],
        },
        [1] * 4,
    ),
    "3d": (
        (1, 2, 4, 3, 5),
        {"kernel_sizes": [2, 3, 2], "pad_type": "custom", "pad": [1, 1, 0, 0, 0, 1]},
        [1, 1, 0, 0, 0, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["max", "mean", "mean_inside", "l2"])
def test_pools_visit_every_window(layout: str, kind: str) -> None:
    shape, settings, pads = LAYOUTS[layout]
    if kind == "l2" and len(shape) == 5:
        return
    name = {"max": "max_pool", "l2": "l2_pool"}.get(kind, "avg_pool")
    if kind == "mean_inside":
        settings = {**settings, "exclude_padding_from_average": True}
    x = image(*shape)
    case = build(name, x=x, **settings)
    out = list(case.operation.outputs[0].shape[2:])
    sizes = settings["kernel_sizes"]
    steps = settings.get("strides", [1] * len(sizes))
    close(evaluate(name, x=x, **settings)[0], pooled(x, kind, sizes, steps, pads, out))


@pytest.mark.parametrize("ceil", [False, True])
def test_pools_equal_torch(ceil: bool) -> None:
    for _ in range(30):
        height, width = RNG.integers(4, 12, 2)
        kernel, step = RNG.integers(2, 5, 2), RNG.integers(1, 3, 2)
        pad = [int(RNG.integers(0, size // 2 + 1)) for size in kernel]
        x = torch.from_numpy(image(1, 2, int(height), int(width)))
        settings = {
            "kernel_sizes": kernel.tolist(),
            "strides": step.tolist(),
            "pad_type": "custom",
            "pad": [pad[0], pad[0], pad[1], pad[1]],
            "ceil_mode": ceil,
        }
        given = (tuple(kernel.tolist()), tuple(step.tolist()), tuple(pad))
        close(
            evaluate("max_pool", x=x.numpy(), **settings)[0],
            F.max_pool2d(x, *given, ceil_mode=ceil).numpy(),
        )
        for inside in (False, True):
            close(
                evaluate("avg_pool", x=x.numpy(), exclude_padding_from_average=inside, **settings)[
                    0
                ],
                F.avg_pool2d(x, *given, ceil_mode=ceil, count_include_pad=not inside).numpy(),
            )


def test_pools_refuse_empty_windows() -> None:
    settings: dict[str, Any] = {"kernel_sizes": [1], "strides": [3], "pad_type": "valid"}
    x = image(1, 1, 3)
    np.testing.assert_array_equal(evaluate("max_pool", x=x, **settings)[0], x[..., :1])
    with pytest.raises(ArtifactError, match="hold no element"):
        evaluate("max_pool", x=x, ceil_mode=True, **settings)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv_transpose_equals_torch(rank: int) -> None:
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    for groups, step, hole in ((1, 1, 1), (2, 2, 1), (2, 3, 2)):
        x, weight = image(2, 4, *[5, 4, 3][:rank]), image(4, 3, *[3, 2, 3][:rank])
        bias = image(3 * groups)
        shared = {"strides": [step] * rank, "dilations": [hole] * rank, "groups": groups}
        tensors = [torch.from_numpy(array) for array in (x, weight, bias)]
        full = function(*tensors, stride=step, dilation=hole, groups=groups)
        actual = evaluate("conv_transpose", x=x, weight=weight, bias=bias, **shared)[0]
        close(actual, full.numpy(), 1e-5)
        pad = [1, 0, 0, 2, 1, 1][: 2 * rank]
        cut = full
        for axis in range(rank):
            size = full.shape[2 + axis] - pad[2 * axis] - pad[2 * axis + 1]
            cut = cut.narrow(2 + axis, pad[2 * axis], size)
        actual = evaluate(
            "conv_transpose", x=x, weight=weight, bias=bias, pad_type="custom", pad=pad, **shared
        )[0]
        close(actual, cut.numpy(), 1e-5)


@pytest.mark.parametrize(("kernel", "step", "size"), [(3, 2, None), (3, 2, 9), (2, 3, None)])
def test_same_conv_transpose_is_the_gradient_of_same_conv(
    kernel: int, step: int, size: int | None
) -> None:
    x, weight = image(1, 2, 5), image(2, 3, kernel)
    asked = {} if size is None else {"output_shape": [1, 3, size]}
    actual = evaluate(
        "conv_transpose", x=x, weight=weight, pad_type="same", strides=[step], **asked
    )[0]
    source = torch.zeros(1, 3, actual.shape[-1], requires_grad=True)
    forward = linear.conv(source, torch.from_numpy(weight), strides=[step], pad_type="same")
    (expected,) = torch.autograd.grad(forward, source, torch.from_numpy(x))
    close(actual, expected.numpy(), 1e-5)


def test_conv_transpose_refuses_what_no_padding_gives() -> None:
    x, weight = image(1, 2, 5), image(2, 3, 3)
    settings: dict[str, Any] = {"x": x, "weight": weight, "strides": [2]}
    assert evaluate("conv_transpose", output_shape=[1, 3, 12], **settings)[0].shape == (1, 3, 12)
    with pytest.raises(ArtifactError, match="13 elements"):
        evaluate("conv_transpose", output_shape=[1, 3, 13], **settings)
    with pytest.raises(ArtifactError, match="its padding gives"):
        evaluate(
            "conv_transpose", output_shape=[1, 3, 10], pad_type="custom", pad=[0, 0], **settings
        )


def test_channels_and_space() -> None:
    x = image(2, 12, 3, 5)
    shuffled = evaluate("pixel_shuffle", x=x, upscale_factor=2)[0]
    deep = evaluate("depth_to_space", x=x, block_size=2)[0]
    for n, c, h, w, i, j in np.ndindex(2, 3, 3, 5, 2, 2):
        assert shuffled[n, c, 2 * h + i, 2 * w + j] == x[n, 4 * c + 2 * i + j, h, w]
        assert deep[n, c, 2 * h + i, 2 * w + j] == x[n, 3 * (2 * i + j) + c, h, w]
    np.testing.assert_array_equal(
        evaluate("pixel_unshuffle", x=shuffled, downscale_factor=np.uint32(2))[0], x
    )
    np.testing.assert_array_equal(evaluate("space_to_depth", x=deep, block_size=2)[0], x)


def test_batch_and_space() -> None:
    x = image(2, 3, 4, 7)
    moved = spatial.space_to_batch(torch.from_numpy(x), [2, 3], [[1, 1], [0, 2]]).numpy()
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 2)))
    assert moved.shape == (12, 3, 3, 3)
    for n, c, h, w in np.ndindex(2, 3, 6, 9):
        assert moved[((h % 2) * 3 + w % 3) * 2 + n, c, h // 2, w // 3] == padded[n, c, h, w]
    back = spatial.batch_to_space(torch.from_numpy(moved), [2, 3], [[1, 1], [0, 2]]).numpy()
    np.testing.assert_array_equal(back, x)
    with pytest.raises(ArtifactError, match="cuts"):
        spatial.crop(torch.from_numpy(x), [3, 2], [0, 0])


def test_crop_and_windows() -> None:
    x = image(2, 3, 4, 7)
    np.testing.assert_array_equal(
        evaluate("crop", x=x, crop_height=[1, 2], crop_width=[0, 3])[0], x[:, :, 1:2, 0:4]
    )
    for axis, size, step in ((1, 2, 1), (-1, 3, 2), (2, 4, 1)):
        windows = evaluate("sliding_windows", x=x, axis=axis, size=size, stride=step)[0]
        at = axis % 4
        for number in range(windows.shape[at]):
            np.testing.assert_array_equal(
                windows.take(number, at), x.take(range(number * step, number * step + size), at)
            )


@pytest.mark.parametrize("rank", [3, 4])
def test_local_response_norm(rank: int) -> None:
    x = image(2, 6, *[3, 2][: rank - 2])
    for settings in ({}, {"alpha": 0.5, "beta": 0.25, "k": 2.0}):
        actual = evaluate("local_response_norm", x=x, size=3, **settings)[0]
        alpha, beta, k = (settings.get(key, d) for key, d in
                          (("alpha", 1e-4), ("beta", 0.75), ("k", 1.0)))  # fmt: skip
        for c in range(6):
            total = (x[:, max(0, c - 1) : c + 2] ** 2).sum(1)
            close(actual[:, c], x[:, c] / (k + alpha / 3 * total) ** beta, 1e-6)
    with pytest.raises(ArtifactError, match="odd"):
        normalization.local_response_norm(torch.from_numpy(x), 4)


def test_pools_of_constants_keep_them() -> None:
    """A mean of ones is one wherever padding is excluded, and the norm counts the elements."""
    x = np.ones((1, 1, 4), np.float16)
    settings: dict[str, Any] = {"x": x, "kernel_sizes": [3], "pad_type": "same"}
    mean = evaluate("avg_pool", exclude_padding_from_average=True, **settings)[0]
    np.testing.assert_array_equal(mean, x)
    counted = evaluate("avg_pool", **settings)[0][0, 0]
    np.testing.assert_array_equal(counted, np.float16([2 / 3, 1, 1, 2 / 3]))
    norm = evaluate("l2_pool", **settings)[0][0, 0]
    np.testing.assert_array_equal(norm, np.float16([math.sqrt(n) for n in (2, 3, 3, 2)]))
