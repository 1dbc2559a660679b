"""A runner without a model: its logits are a table that a test writes."""

from __future__ import annotations

from typing import final

import torch

from llm_coreml.runtime.runner import Runner


@final
class FakeRunner(Runner):
    """After token `t` at position `p` the logits are `table[t] + p * drift`.

    Attributes:
        calls: Tokens and start of every call, in order.
        resets: How often the cache was emptied.
    """

    def __init__(
        self,
        table: torch.Tensor,
        *,
        context: int = 32,
        seq_lengths: tuple[int, ...] = (1, 4, 8),
        every_row: bool = False,
        drift: float = 0.0,
        label: str = "fake",
    ) -> None:
        super().__init__()
        self.table = table
        self.vocab_size = table.shape[1]
        self.context = context
        self.seq_lengths = seq_lengths
        self.every_row = every_row
        self.drift = torch.arange(self.vocab_size) * drift
        self.label = label
        self.calls: list[tuple[list[int], int]] = []
        self.resets = 0

    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        chunk: list[int] = tokens[0].tolist()
        start = int(start_pos)
        assert len(chunk) in self.seq_lengths
        assert tokens.dtype == start_pos.dtype == torch.int64
        self.calls.append((chunk, start))
        positions = torch.arange(start, start + len(chunk)).unsqueeze(1)
        rows = self.table[tokens[0]] + positions * self.drift
        return (rows if self.every_row else rows[-1:]).unsqueeze(0)

    def _clear(self) -> None:
        self.resets += 1
