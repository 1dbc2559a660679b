"""What each row of logits is worth, by itself and beside the original's, in one pass over it.

    found = score(logits, targets, original)
    found["nll"].mean(), found["kl"].max()

Computed in float64, so that small divergences are not noise. The mathematics is that of `fidelity`.
"""

from __future__ import annotations

import torch

# Rows at a time: float64 copies of a whole window of a large vocabulary take gigabytes.
_ROWS = 16
_FEW = 5


def score(
    logits: torch.Tensor, targets: torch.Tensor, original: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return what is known of each row, float64 `[rows]` by name.

    Args:
        logits: float `[rows, vocab]`.
        targets: int64 `[rows]`, the tokens that came.
        original: Logits of the original, same shape.

    Returns:
        `nll`: cost of the token in nats; `finite`: one where no logit is inf or NaN. With an
        original: `kl`, the divergence from it in nats; `base`, its own cost; `confidence`, the
        probability of its most likely token; `top1` and `top5`, one where that is the most likely
        here, or one of five.
    """
    parts = []
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        parts.append(
            _score(logits[rows], targets[rows], None if original is None else original[rows])
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _score(
    logits: torch.Tensor, targets: torch.Tensor, original: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    finite = logits.isfinite().all(-1)
    q = torch.log_softmax(logits.to(torch.float64), dim=-1)
    wanted = targets.unsqueeze(1)
    found = {"nll": -q.gather(1, wanted).squeeze(1)}
    if original is None:
        return {**found, "finite": finite.to(torch.float64)}
    p = torch.log_softmax(original.to(torch.float64), dim=-1)
    best, place = p.max(-1, keepdim=True)
    likely = q.topk(min(_FEW, q.shape[-1]), dim=-1).indices
    found |= {
        "kl": (p.exp() * (p - q)).sum(-1).clamp(min=0.0),
        "base": -p.gather(1, wanted).squeeze(1),
        "confidence": best.squeeze(1).exp(),
        "top1": (q.argmax(-1, keepdim=True) == place).squeeze(1).to(torch.float64),
        "top5": (likely == place).any(-1).to(torch.float64),
    }
    return {**found, "finite": (finite & original.isfinite().all(-1)).to(torch.float64)}
