"""What happens inside a model: the error of each layer, and how far noise alone moves an original.

    layer_errors(original, quantized, window)[-1].error
    noise_floor(original, windows).mean_kl

The noise floor is that of exllamav3's qbench: the original beside itself, each element that a layer
gives multiplied by 1 + 2^-9 times a number drawn from the normal distribution, which is what
rounding to bfloat16 amounts to. What is nearer to the original than that is as good as equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_coreml.eval.measures import LayerError, NoiseFloor
from llm_coreml.eval.token_scores import score
from llm_coreml.runtime.eager import EagerRunner

_NOISE = 2.0**-9
_SEED = 20261129


def layer_errors(
    original: EagerRunner, other: EagerRunner, window: Sequence[int]
) -> tuple[LayerError, ...]:
    """Return how far the residual stream of another model of the same sizes is after each layer.

    Args:
        original: What it is compared to.
        other: The quantized model, say.
        window: Tokens that both read.

    Returns:
        Root of the mean square of the difference, by that of the original's stream.
    """
    found = []
    pairs = zip(original.streams(window), other.streams(window), strict=True)
    for layer, (theirs, ours) in enumerate(pairs):
        size = theirs.double().square().mean()
        away = (ours.double() - theirs.double()).square().mean()
        found.append(LayerError(layer, float((away / size).sqrt()) if size else 0.0))
    return tuple(found)


def noise_floor(original: EagerRunner, windows: Sequence[Sequence[int]]) -> NoiseFloor:
    """Return how far an original is from itself with noise after each layer.

    Args:
        original: The model.
        windows: Token windows; the first token of each is given, the others are scored.
    """
    drawn = torch.Generator().manual_seed(_SEED)

    def noisy(stream: torch.Tensor) -> torch.Tensor:
        return stream * (1 + _NOISE * torch.randn(stream.shape, generator=drawn))

    kl, same = [], []
    for window in windows:
        *_, plain = original.streams(window[:-1])
        *_, moved = original.streams(window[:-1], noisy)
        theirs, ours = original.logits_of(plain), original.logits_of(moved)
        scored = score(ours, torch.tensor(window[1:]), theirs)
        kl.append(scored["kl"])
        same.append(scored["top1"])
    every = torch.cat(kl)
    return NoiseFloor(
        mean_kl=float(every.mean()),
        p99_kl=float(every.quantile(0.99)),
        top1_agreement=float(torch.cat(same).mean()),
        tokens=len(every),
    )
