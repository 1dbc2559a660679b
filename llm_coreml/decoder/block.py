"""The block that joins attention and MLP."""

from __future__ import annotations

import torch
from torch import nn

from llm_coreml.decoder.attention import Attention, AttentionForm
from llm_coreml.decoder.chunk import Chunk
from llm_coreml.decoder.mlp import MLP
from llm_coreml.decoder.norm import RMSNorm
from llm_coreml.decoder.spec import DecoderSpec


class Block(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, spec: DecoderSpec, layer: int, form: AttentionForm) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, layer, form)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Map `[1, S, hidden]` to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), chunk)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]
