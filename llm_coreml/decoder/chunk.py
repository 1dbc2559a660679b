"""What a pass over one chunk of tokens tells every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from llm_coreml.decoder.caches import CacheView
from llm_coreml.decoder.spec import AttentionSpec, MaskKey, QueryGrowth
from llm_coreml.decoder.state import View

# Far below any score, far inside fp16: exp() of it is zero, and no -inf meets the hardware.
_MASKED = -4.0e4
# What distance takes from a score at most, which is all of it: fp16 holds the sum with a mask.
_FARTHEST = -2.0e4


@dataclass(frozen=True)
class Chunk:
    """What every layer is told of the chunk that it works on.

    Attributes:
        rotary: Cosines and sines of the S positions, `[S, 1, dim / 2]` each, for every table.
        turns: The same of heads that come first, as `rope.both_halves` makes them; empty where no
            layer asks for them.
        masks: Added to the scores, `[1, 1, group * S, positions]`, by what they follow from;
            with slopes `[1, kv_heads, group * S, positions]`.
        growths: What queries are multiplied by, `[S, 1, 1]`, by what it follows from.
        zeros: As many as there are tokens, `[S, 1]`; None where no layer has sinks.
        views: States by name, updated by each layer.
    """

    rotary: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    turns: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    masks: Mapping[MaskKey, torch.Tensor]
    growths: Mapping[QueryGrowth, torch.Tensor]
    zeros: torch.Tensor | None
    views: Mapping[str, View]

    def mask(self, spec: AttentionSpec) -> torch.Tensor:
        """Return the mask of an attention's scores."""
        (key,) = spec.masks
        return self.masks[key]

    def growth(self, spec: AttentionSpec) -> torch.Tensor | None:
        """Return what an attention's queries are multiplied by; None where that is one."""
        return None if spec.query_growth is None else self.growths.get(spec.query_growth)

    def cache(self, name: str) -> CacheView:
        """Return the keys and values of a cache."""
        view = self.views[name]
        assert isinstance(view, CacheView)
        return view

    def to(self, device: torch.device) -> Chunk:
        """Return the same on another device, but for the states, which stay where they are."""
        return replace(
            self,
            rotary=tuple((cos.to(device), sin.to(device)) for cos, sin in self.rotary),
            turns=tuple((cos.to(device), sin.to(device)) for cos, sin in self.turns),
            masks={key: mask.to(device) for key, mask in self.masks.items()},
            growths={key: growth.to(device) for key, growth in self.growths.items()},
            zeros=None if self.zeros is None else self.zeros.to(device),
        )


def make_mask(
    key: MaskKey, rows: torch.Tensor, columns: torch.Tensor, slopes: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what is added to the scores: zero for what a token sees, and far below for the rest.

    Args:
        key: One of `AttentionSpec.masks`.
        rows: int32 `[S]`, positions of the tokens.
        columns: int32 `[positions]`, positions that there may be something at, from 0 on, where a
            window that is no shorter cuts nothing off; or those that a ring holds, larger than
            the window.
        slopes: float32 `[heads, 1, 1]`, what a score loses for each position of distance.

    Returns:
        float32 `[1, 1, group * S, positions]`, with slopes `[1, kv_heads, group * S, positions]`.
    """
    group, window, _ = key
    repeated = torch.cat([rows] * group).view(1, 1, -1, 1)
    mask = (columns > repeated).to(torch.float32) * _MASKED
    if window is not None and window < len(columns):
        mask = mask + (columns <= repeated - window).to(torch.float32) * _MASKED
    return mask if slopes is None else mask + _far_away(group, rows, columns, slopes)


def _far_away(
    group: int, rows: torch.Tensor, columns: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """Return what distance takes from each score, `[1, kv_heads, group * S, positions]`."""
    ahead = (columns - rows.view(-1, 1)).to(torch.float32)  # [S, positions]
    # What lies ahead is masked, so that its sign is nobody's.
    lost = (ahead * slopes).clamp(_FARTHEST, 0.0)
    return lost.view(1, len(slopes) // group, -1, len(columns))
