"""Measures between two rows of logits, in float64 so that small divergences are not noise."""

from __future__ import annotations

import torch

# Rows at a time: float64 copies of a whole window of a large vocabulary take gigabytes.
_ROWS = 16


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || other) of each row, in nats.

    Args:
        reference: float logits `[rows, vocab]`.
        other: float logits, same shape.

    Returns:
        float64 `[rows]`, never below zero.
    """
    parts = []
    for rows, others in zip(torch.split(reference, _ROWS), torch.split(other, _ROWS), strict=True):
        p = torch.log_softmax(rows.to(torch.float64), dim=-1)
        q = torch.log_softmax(others.to(torch.float64), dim=-1)
        parts.append((p.exp() * (p - q)).sum(dim=-1).clamp(min=0.0))
    return torch.cat(parts)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cost of each target in nats: float64 `[rows]`.

    Args:
        logits: float `[rows, vocab]`.
        targets: int64 `[rows]`.
    """
    parts = []
    for rows, wanted in zip(torch.split(logits, _ROWS), torch.split(targets, _ROWS), strict=True):
        logs = torch.log_softmax(rows.to(torch.float64), dim=-1)
        parts.append(-logs.gather(1, wanted.unsqueeze(1)).squeeze(1))
    return torch.cat(parts)
