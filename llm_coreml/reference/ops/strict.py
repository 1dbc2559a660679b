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
    if declared != "fp16" or x.dim() < 2 or y.dim() < 2:
        return products.matmul(x, y, transpose_x, transpose_y)
    x = x.transpose(-1, -2) if transpose_x else x
    return multiply(x, y.transpose(-1, -2) if transpose_y else y)


@op("einsum", OPS["einsum"].result, fresh=True, table=STRICT_OPS)
def einsum(values: Sequence[Tensor], equation: str, declared: str) -> Tensor:
    """Return the contraction of two tensors over the one letter that the result lacks."""
    left, _, result = equation.replace(" ", "").partition("->")
    first, _, second = left.partition(",")
    summed = (set(first) & set(second)) - set(result)
    if declared != "fp16" or len(summed) != 1:
        return products.einsum(values, equation)
    letter = summed.pop()
    x, y = (
        value.movedim(names.index(letter), 0)
        for value, names in zip(values, (first, second), strict=True)
    )
    rest = f"{first.replace(letter, '')},{second.replace(letter, '')}->{result}"
    total: Tensor | None = None
    for parts in zip(x, y, strict=True):
        product = torch.einsum(rest, *parts)
        total = round_to_half(product if total is None else total + product)
    return products.einsum(values, equation) if total is None else total


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
    scores = round_to_half(multiply(query, key.transpose(-1, -2)) / query.shape[-1] ** 0.5)
    scores = round_to_half(attention.masked(scores, attn_mask))
    return multiply(round_to_half(torch.softmax(scores, -1)), value)
