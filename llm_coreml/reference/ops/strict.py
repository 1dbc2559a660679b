"""Matrix products whose sums are fp16 throughout, for the mode `strict-fp16`.

Products are added one after another, and each sum is rounded to fp16. Hardware that accumulates in
fp16 adds in some order of its own, mostly in short trees; the plain order is the least favourable
of the usual ones, so a model that survives this survives them. A product declared fp32 keeps fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops import attention
from llm_coreml.reference.ops import linear as products
from llm_coreml.reference.ops.registry import OPS, Spec, Tensor, op

STRICT_OPS: dict[str, Spec] = {}


def round_to_half(x: Tensor) -> Tensor:
    """Return the fp32 tensor with every value rounded to what fp16 holds; too large ones to inf."""
    return x.to(torch.float16).to(torch.float32)


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """Return x [*, M, K] @ y [*, K, N], fp32 tensors of fp16 values, each sum rounded to fp16."""
    total: Tensor | None = None
    for place in range(x.shape[-1]):
        # A product of two fp16 values is exact in fp32.
        product = x[..., place, None] * y[..., None, place, :]
        total = round_to_half(product if total is None else total + product)
    return torch.matmul(x, y) if total is None else total


def _with_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias


@op("linear", OPS["linear"].result, fresh=True, table=STRICT_OPS)
def linear(x: Tensor, weight: Tensor, declared: str, bias: Tensor | None = None) -> Tensor:
    """Return x [..., in] @ weight [out, in].T + bias [out]."""
    if declared != "fp16":
        return products.linear(x, weight, bias)
    rows = x.reshape(1, -1) if x.dim() == 1 else x.reshape(-1, x.shape[-1])
    return _with_bias(multiply(rows, weight.T), bias).reshape(*x.shape[:-1], weight.shape[0])


@op("matmul", OPS["matmul"].result, fresh=True, table=STRICT_OPS)
def matmul(
    x: Tensor, y: Tensor, declared: str, transpose_x: bool = False, transpose_y: bool = False
) -> Tensor:
    """Return the batched product of x and y, each transposed in its last two axes on demand."""
    if declared != "fp16":
        return products.matmul(x, y, transpose_x, transpose_y)
    x = x.transpose(-1, -2) if transpose_x and x.dim() > 1 else x
    y = y.transpose(-1, -2) if transpose_y and y.dim() > 1 else y
    product = multiply(x[None] if x.dim() == 1 else x, y[:, None] if y.dim() == 1 else y)
    product = product.squeeze(-1) if y.dim() == 1 else product
    return product.squeeze(-1 if y.dim() == 1 else -2) if x.dim() == 1 else product


@op("einsum", OPS["einsum"].result, fresh=True, table=STRICT_OPS)
def einsum(values: Sequence[Tensor], equation: str, declared: str) -> Tensor:
    """Return the contraction of two tensors; axes of size 1 broadcast."""
    left, _, result = equation.replace(" ", "").partition("->")
    names = left.split(",")
    if declared != "fp16" or len(names) != 2:
        return products.einsum(values, equation)
    summed = sorted((set(names[0]) & set(names[1])) - set(result))
    sizes = [
        max(value.shape[name.index(letter)] for value, name in zip(values, names, strict=True))
        for letter in summed
    ]
    x, y = (
        _summed_first(value, name, summed, sizes) for value, name in zip(values, names, strict=True)
    )
    rest = ",".join("".join(letter for letter in name if letter not in summed) for name in names)
    total: Tensor | None = None
    for parts in zip(x, y, strict=True):
        product = torch.einsum(f"{rest}->{result}", *parts)
        total = round_to_half(product if total is None else total + product)
    return products.einsum(values, equation) if total is None else total


def _summed_first(value: Tensor, name: str, summed: list[str], sizes: list[int]) -> Tensor:
    """Return value with the summed axes, broadcast to sizes, as one first axis."""
    moved = value.movedim([name.index(letter) for letter in summed], list(range(len(summed))))
    others = moved.shape[len(summed) :]
    return moved.expand(*sizes, *others).reshape(-1, *others)


@op("conv_transpose", OPS["conv_transpose"].result, fresh=True, table=STRICT_OPS)
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    declared: str,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Return the transposed convolution of values declared fp32; fp16 sums are not defined here."""
    if declared == "fp16":
        raise ArtifactError("has no form with fp16 sums; use another mode")
    return products.conv_transpose(
        x, weight, bias, pad, output_shape, pad_type, strides, dilations, groups
    )


@op("conv", OPS["conv"].result, fresh=True, table=STRICT_OPS)
def conv(
    x: Tensor,
    weight: Tensor,
    declared: str,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """Return the convolution of x [N, C, *D] with weight [out, C / groups, *K]."""
    if declared != "fp16":
        return products.conv(x, weight, bias, strides, pad_type, pad, dilations, groups)
    total: Tensor | None = None
    # One input channel and one place of the kernel at a time is one product per output.
    for channel in range(weight.shape[1]):
        for place in range(weight[0, 0].numel()):
            single = torch.zeros_like(weight[:, :1])
            single.view(*single.shape[:2], -1)[..., place] = weight[:, channel].flatten(1)[
                :, None, place
            ]
            inputs = x[:, channel :: weight.shape[1]]
            product = products.conv(inputs, single, None, strides, pad_type, pad, dilations, groups)
            total = round_to_half(product if total is None else total + product)
    if total is None:
        raise ArtifactError("convolves with an empty kernel")
    return _with_bias(total, bias if bias is None else bias.reshape(-1, *[1] * (x.dim() - 2)))


@op(
    "scaled_dot_product_attention",
    OPS["scaled_dot_product_attention"].result,
    fresh=True,
    table=STRICT_OPS,
)
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, declared: str, attn_mask: Tensor | None = None
) -> Tensor:
    """Return softmax(query @ key.T / sqrt(E) + mask) @ value, each step rounded to fp16."""
    if declared != "fp16":
        return attention.scaled_dot_product_attention(query, key, value, attn_mask)
    attention.check_batch(query, key, value)
    scores = round_to_half(multiply(query, key.transpose(-1, -2)) / query.shape[-1] ** 0.5)
    scores = round_to_half(attention.masked(scores, attn_mask))
    return multiply(round_to_half(torch.softmax(scores, -1)), value)
