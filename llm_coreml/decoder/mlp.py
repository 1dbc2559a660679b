"""Feed-forward layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder.linear import Linear
from llm_coreml.decoder.spec import DecoderSpec


class MLP(nn.Module):
    """Gated feed-forward: `down(silu(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=spec.mlp_bias)
        self.up_proj = Linear(hidden, inner, bias=spec.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=spec.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[1, S, hidden]` to the same shape."""
        return self.down_proj(self.down_proj.arrange(self.inner(x)))  # type: ignore[no-any-return]

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """Return `silu(gate(x)) * up(x)`, `[1, S, intermediate]`."""
        x = self.gate_proj.arrange(x)  # which is that of `up_proj`, too
        gate: torch.Tensor = self.gate_proj(x)
        return F.silu(gate) * self.up_proj(x)  # type: ignore[no-any-return]
