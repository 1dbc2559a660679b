"""The decoder: tokens and a position in, logits out, with the KV cache inside.

    decoder = Decoder(spec, context=512)     # sizes only: weights arrive one at a time
    logits = decoder(tokens, start_pos)      # int64 [1, S], int64 [1] -> float [1, 1, vocab]

The same module runs eagerly (the judge of every artifact) and is exported for Core ML.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder.attention import AttentionForm
from llm_coreml.decoder.block import Block
from llm_coreml.decoder.chunk import Chunk
from llm_coreml.decoder.linear import Embedding, Linear
from llm_coreml.decoder.norm import RMSNorm
from llm_coreml.decoder.rope import rope_tables
from llm_coreml.decoder.spec import DecoderSpec
from llm_coreml.decoder.states import KVCache

LogitsForm = Literal["last", "all"]

# Far below any score, far inside fp16: exp() of it is zero, and no -inf meets the hardware.
_MASKED = -4.0e4


class Decoder(nn.Module):
    """A decoder-only transformer with a static graph and a fixed context.

    Args:
        spec: Sizes and options.
        context: Positions that the KV cache holds.
        attention: `fused` or `decomposed`, see `Attention`.
        logits: `last` returns the last row of a chunk, `all` every row.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor

    def __init__(
        self,
        spec: DecoderSpec,
        context: int,
        attention: AttentionForm = "fused",
        logits: LogitsForm = "last",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.context = context
        self.logits = logits
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(
            Block(spec, layer, attention) for layer in range(spec.num_hidden_layers)
        )
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.cache = KVCache(
            spec.num_hidden_layers, spec.num_key_value_heads, context, spec.head_dim
        )
        cos, sin = rope_tables(spec.rope, spec.head_dim, context)
        self.register_buffer("cos", cos.to(torch.float32), persistent=False)
        self.register_buffer("sin", sin.to(torch.float32), persistent=False)
        positions = torch.arange(context, dtype=torch.int32)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Run one chunk that continues the sequence at `start_pos`.

        Args:
            tokens: int64 `[1, S]`, 1 <= S, `start_pos` + S <= context.
            start_pos: int64 `[1]`, how many positions of the cache are filled.

        Returns:
            float32 logits, `[1, 1, vocab]` (`last`) or `[1, S, vocab]` (`all`).
        """
        x = self.hidden(tokens, start_pos)
        return self.head(x[:, -1:] if self.logits == "last" else x)

    def hidden(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does up to the head, for every row: float32 `[1, S, hidden]`."""
        return self.blocks(self.embed_tokens(tokens.to(torch.int32)), start_pos)

    def blocks(self, x: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Do what `hidden` does, for tokens whose rows of the table are `x` `[1, S, hidden]`."""
        chunk = self.chunk(x.shape[1], start_pos)
        for block in self.layers:
            x = block(x, chunk)
        self.cache.close(chunk.cache)
        return x

    def chunk(self, length: int, start_pos: torch.Tensor) -> Chunk:
        """Return what every block is told of `length` tokens from `start_pos` int64 `[1]` on."""
        start_pos = start_pos.to(torch.int32)
        rows = self.positions[:length] + start_pos  # [S]
        cos = F.embedding(rows, self.cos).unsqueeze(1)  # [S, 1, head_dim / 2]
        sin = F.embedding(rows, self.sin).unsqueeze(1)
        return Chunk(cos, sin, self._mask(rows), self.cache.open(), start_pos)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of rows that `hidden` gave, `[..., hidden]` -> `[..., vocab]`."""
        return self.lm_head(self.norm(x))  # type: ignore[no-any-return]

    def _mask(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `[1, 1, group * S, context]`: zero up to each row's position, then far below."""
        repeated = torch.cat([rows] * self.spec.num_queries_per_kv).view(1, 1, -1, 1)
        return (self.positions > repeated).to(torch.float32) * _MASKED
