"""What a pass over one chunk of tokens tells every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_coreml.decoder.states import CacheView


@dataclass(frozen=True)
class Chunk:
    """What every layer is told of the chunk that it works on.

    Attributes:
        cos: Cosines of the S positions, `[S, 1, head_dim / 2]`.
        sin: Sines, same shape.
        mask: Added to the scores, `[1, 1, group * S, context]`.
        cache: Keys and values, updated by each layer.
        start_pos: int `[1]`, position of the first token.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor
    cache: CacheView
    start_pos: torch.Tensor
