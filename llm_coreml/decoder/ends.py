"""What stands at both ends of a decoder, apart from it: the token table, and the head's matrix.

    rows = Rows(table, None, torch.float16)(tokens)
    hidden = Part(decoder, share)(hidden=rows, start_pos=start_pos)[0]
    logits = Products(decoder)(hidden)

Parts whose share says `table_outside` or `head_outside` are what is between the two. They are made
of operations that any runtime has, so that something else than Core ML may run them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder.decoder import Decoder


class Rows(nn.Module):
    """The token table.

    Args:
        table: Plain numbers, or int8 codes, `[vocab, hidden]`.
        scales: What the codes of each row are multiplied with, `[vocab, 1]`; None of plain numbers.
        dtype: Of what is given.
    """

    def __init__(
        self, table: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.table = nn.Parameter(table.detach(), requires_grad=False)
        self.scales = None if scales is None else nn.Parameter(scales.detach(), requires_grad=False)
        self.dtype = dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows of int `tokens` `[1, S]`, `[1, S, hidden]`."""
        rows = F.embedding(tokens, self.table)
        if self.scales is None:
            return rows.to(self.dtype)
        scales = F.embedding(tokens, self.scales)
        return (rows.to(torch.float32) * scales.to(torch.float32)).to(self.dtype)


class Products(nn.Module):
    """The head's matrix, and what follows it.

    Its numbers are fp32, inputs by outputs: ExecuTorch's portable kernel adds products up in the
    type of its inputs, and turns no matrix.

    Args:
        decoder: Whose head it is, of plain numbers.
    """

    multiplier: torch.Tensor | None

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        head = decoder.lm_head
        matrix = head.weight.detach().to(torch.float32).t().contiguous()
        self.matrix = nn.Parameter(matrix, requires_grad=False)
        bias = None if head.bias is None else head.bias.detach().to(torch.float32)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("multiplier", decoder.logits_multiplier, persistent=False)
        self.softcap = decoder.softcap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits `[1, S, vocab]` of what a part gave, float `[1, S, hidden]`."""
        products = torch.mm(hidden.to(torch.float32).squeeze(0), self.matrix).unsqueeze(0)
        products = products if self.bias is None else products + self.bias
        logits = products if self.multiplier is None else products * self.multiplier
        return logits if self.softcap is None else self.softcap(logits)
