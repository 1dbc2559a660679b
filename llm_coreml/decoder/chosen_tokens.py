"""The likeliest tokens of each row of logits, where a program gives these alone."""

from __future__ import annotations

import torch

from llm_coreml.heads import Head


def chosen(logits: torch.Tensor, head: Head) -> tuple[torch.Tensor, ...]:
    """Return what a head gives of float logits `[1, S, vocab]`: these, or K of each row.

    The K are float32 values and their tokens, int32, `[1, S, K]` each, the largest first.
    """
    if head.kind == "argmax":
        token = torch.argmax(logits, dim=-1, keepdim=True)
        return torch.amax(logits, dim=-1, keepdim=True), token.to(torch.int32)
    if head.count is None:
        return (logits,)
    values, tokens = torch.topk(logits, head.count, dim=-1)
    return values, tokens.to(torch.int32)
