"""Scaled dot-product attention."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.ops.registry import Tensor, floats, op

# Up to here the formula is faster than torch's kernel, which is made for many rows.
_FEW_ROWS = 16
# Keys that torch's kernel on a CPU looks at together.
_BLOCK = 512
# What is masked is lower than the rest by more than this.
_FAR = 1000.0
# The exponential of its negative is zero in fp32.
_GONE = 128.0


@op("scaled_dot_product_attention", floats("query", "key", "value"), fresh=True)
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Return softmax(query @ key.T / sqrt(E) + mask) @ value.

    Args:
        query: [B, *, L, E].
        key: [B, *, S, E].
        value: [B, *, S, EV].
        attn_mask: broadcastable to [B, *, L, S]; bool (True takes part) or float (added).

    Returns:
        [B, *, L, EV]; a row whose mask admits nothing is NaN, as the formula gives.

    Raises:
        ArtifactError: the batch axes differ; MIL's definition does not broadcast them.
    """
    check_batch(query, key, value)
    if query.shape[-2] <= _FEW_ROWS:
        return _by_formula(query, key, value, attn_mask)
    if attn_mask is None:
        return F.scaled_dot_product_attention(query, key, value)
    count = _needed(query, key, value, attn_mask)
    key, value = key[..., :count, :], value[..., :count, :]
    attn_mask = attn_mask if attn_mask.shape[-1] == 1 else attn_mask[..., :count]
    result = F.scaled_dot_product_attention(query, key, value, attn_mask)
    if attn_mask.dtype == torch.bool:
        empty = ~attn_mask.any(-1, keepdim=True)
    else:
        empty = attn_mask.amax(-1, keepdim=True) == -torch.inf
    # torch gives zeros for such rows; the formula does not, and a program must not rely on it.
    return torch.where(empty, torch.nan, result) if bool(empty.any()) else result


def _needed(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> int:
    """Return how many keys torch's kernel need look at for the same bits.

    A cache that is hardly filled is mostly masked. The kernel goes by blocks, and a block adds
    zeros to every sum if its scores are below each row's largest by more than an exponential of
    fp32 holds: a score is at most the product of the lengths of a query and a key.
    """
    count = key.shape[-2]
    plain = attn_mask.is_floating_point() and attn_mask.shape[-1] == count
    if count <= _BLOCK or not plain or key.device.type != "cpu":
        return count
    columns = attn_mask.amax(-2).reshape(-1, count).amax(0)
    seen = (columns > columns.amax() - _FAR).nonzero()
    last = int(seen[-1]) + 1 if len(seen) else count
    kept = min(count, -(-last // _BLOCK) * _BLOCK)
    if kept == count:
        return count
    longest = [each.float().square().sum(-1).amax().sqrt() for each in (query, key)]
    score = longest[0] * longest[1] / math.sqrt(query.shape[-1])
    below = attn_mask[..., :kept].amax(-1).amin() - columns[kept:].amax() - 2 * score
    # What is infinite or no number makes the comparison false, or NaN of a sum with zero.
    zeros = 0 * torch.stack(torch.aminmax(value[..., kept:, :])).float().sum()
    return kept if bool(below + zeros > _GONE) else count


def check_batch(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse batch axes that differ.

    Raises:
        ArtifactError: they do.
    """
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        raise ArtifactError(
            f"has batch axes {list(query.shape[:-2])}, {list(key.shape[:-2])} and "
            f"{list(value.shape[:-2])} of query, key and value, which must be equal"
        )


def _by_formula(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return torch.softmax(masked(scores, attn_mask), -1) @ value


def masked(scores: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Return scores [*, L, S] with the mask added, or with -inf where a bool mask is False."""
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, scores, -torch.inf)
    return scores + attn_mask
