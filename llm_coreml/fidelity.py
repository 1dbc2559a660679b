"""Measures between two rows of logits, in float64 so that small divergences are not noise."""

from __future__ import annotations

import torch


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || other) of each row, in nats.

    Args:
        reference: float logits `[rows, vocab]`.
        other: float logits, same shape.

    Returns:
        float64 `[rows]`, never below zero.
    """
    p = torch.log_softmax(reference.to(torch.float64), dim=-1)
    q = torch.log_softmax(other.to(torch.float64), dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).clamp(min=0.0)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cost of each target in nats: float64 `[rows]`.

    Args:
        logits: float `[rows, vocab]`.
        targets: int64 `[rows]`.
    """
    logs = torch.log_softmax(logits.to(torch.float64), dim=-1)
    return -logs.gather(1, targets.unsqueeze(1)).squeeze(1)
