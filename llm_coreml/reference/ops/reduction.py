"""Reductions, extreme places, sorting and running sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.elementwise import to_integer
from llm_coreml.reference.ops.registry import Tensor, fixed, named_by, op, same
from llm_coreml.reference.ops.storage import storage

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _reduction(name: str, function: Reduce, *, exact: bool = False) -> None:
    def kernel(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        over = list(range(x.dim())) if axes is None else axes
        if x.is_floating_point():
            return function(x, over, keep_dims)
        # Whole numbers up to 2^53 are exact in float64; the result is cut towards zero.
        result = function(x.to(torch.float64), over, keep_dims).trunc()
        limit = torch.iinfo(x.dtype)
        if not bool(((result >= limit.min) & (result <= limit.max)).all()):
            raise ArtifactError(f"gives a result that does not fit {x.dtype}")
        return result.to(x.dtype)

    op(name, same("x"), exact=exact, fresh=True)(kernel)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x if axes else x.clone()


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


_reduction("reduce_sum", lambda x, axes, keep: x.sum(axes, keepdim=keep))
_reduction("reduce_mean", lambda x, axes, keep: x.mean(axes, keepdim=keep))
_reduction("reduce_max", lambda x, axes, keep: x.amax(axes, keepdim=keep), exact=True)
_reduction("reduce_min", lambda x, axes, keep: x.amin(axes, keepdim=keep), exact=True)
_reduction("reduce_prod", _product)
_reduction("reduce_sum_square", lambda x, axes, keep: x.square().sum(axes, keepdim=keep))
_reduction("reduce_l1_norm", lambda x, axes, keep: x.abs().sum(axes, keepdim=keep))
_reduction("reduce_l2_norm", lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt())
_reduction("reduce_log_sum", lambda x, axes, keep: x.sum(axes, keepdim=keep).log())
_reduction("reduce_log_sum_exp", _log_sum_exp)


@op("reduce_argmax", named_by("output_dtype", "int32"), exact=True, fresh=True)
def reduce_argmax(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    """Return the first place of the largest element along axis."""
    return to_integer(x.argmax(axis, keepdim=keep_dims), output_dtype)


@op("reduce_argmin", named_by("output_dtype", "int32"), exact=True, fresh=True)
def reduce_argmin(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    """Return the first place of the smallest element along axis."""
    return to_integer(x.argmin(axis, keepdim=keep_dims), output_dtype)


@op("argsort", fixed("int32"), exact=True, fresh=True)
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    """Return the places that sort x along axis; equal elements keep their order."""
    return x.argsort(dim=axis, descending=not ascending, stable=True).to(torch.int32)


def _topk_types(dtypes: Mapping[str, str], constants: Mapping[str, Any]) -> tuple[str, ...]:
    values = dtypes["x"]
    if not constants.get("return_indices", True):
        return (values,)
    return (values, str(constants.get("output_indices_dtype", "int32")))


@op("topk", _topk_types, exact=True, fresh=True)
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """Return the k largest (smallest if ascending) elements along axis, and their places.

    Sorted, even where the program does not ask for it; equal elements keep their order.
    """
    values, places = x.sort(dim=axis, descending=not ascending, stable=True)
    values, places = values.narrow(axis, 0, k), places.narrow(axis, 0, k)
    if not return_indices:
        return (values,)
    return values, to_integer(places, output_indices_dtype)


@op("cumsum", same("x"), fresh=True)
def cumsum(
    x: Tensor, declared: str, axis: int = 0, exclusive: bool = False, reverse: bool = False
) -> Tensor:
    """Return running sums along axis, exclusive of the own element or from the end on demand."""
    data = x.flip(axis) if reverse else x
    total = data.cumsum(axis, dtype=storage(declared))
    if exclusive:
        total = total.roll(1, axis)
        total.narrow(axis, 0, min(1, total.shape[axis])).zero_()
    return total.flip(axis) if reverse else total
