"""An eager decoder as a runner: the judge of the artifact that is made from it.

EagerRunner(decoder, "quantized").logits([1, 42, 7])
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.matrices import Embedding
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.runtime.runner import Runner


@final
class EagerRunner(Runner):
    """A decoder in PyTorch, fp32: the judge of the artifact made from it."""

    # Eager code takes any length; this only bounds the size of the attention scores.
    _LONGEST = 1024

    def __init__(self, decoder: Decoder, label: str) -> None:
        super().__init__()
        self.decoder = decoder
        self.context = decoder.context
        self.vocab_size = decoder.spec.vocab_size
        longest = min(self._LONGEST, decoder.context)
        self.seq_lengths = tuple(range(1, longest + 1))
        self.every_row = True
        self.rewinds = decoder.spec.rewinds(decoder.extent)
        self.label = label

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._head(self._hidden(tokens, start_pos))

    def _hidden(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Do what `Decoder.hidden` does without expanding a token table as a whole."""
        return self.decoder.blocks(
            self.decoder.embed(tokens, start_pos, look_up=_look_up), start_pos
        )

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        """Do what `Decoder.head` does without expanding the head as a whole."""
        x = self.decoder.norm(x)
        weight = self.decoder.lm_head.weight
        products = torch.cat([F.linear(x, rows) for rows in dense_rows(weight)], -1)
        return self.decoder.leaving(products)

    def _clear(self) -> None:
        with torch.no_grad():
            self.decoder.reset()


def _look_up(table: Embedding, tokens: torch.Tensor) -> torch.Tensor:
    x, start = torch.empty(*tokens.shape, table.weight.shape[1]), 0
    for rows in dense_rows(table.weight):
        inside = (tokens >= start) & (tokens < start + len(rows))
        x[inside] = rows[tokens[inside] - start]
        start += len(rows)
    return x
