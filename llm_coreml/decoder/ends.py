"""What stands at both ends of a decoder, apart from it: the token table, and the head's matrix.

    hidden = Part(decoder, share)(hidden=Rows(decoder)(tokens), start_pos=start_pos)[0]
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
        decoder: Whose table it is, of plain numbers.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.table = nn.Parameter(decoder.embed_tokens.weight.detach(), requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows of int `tokens` `[1, S]`, `[1, S, hidden]` of the table's type."""
        return F.embedding(tokens, self.table)


class Products(nn.Module):
    """The head's matrix, and what follows it.

    Its numbers are fp32, inputs by outputs: ExecuTorch's portable kernel adds products up in the
    type of its inputs, and turns no matrix.

    Args:
        decoder: Whose head it is, of plain numbers.
    """

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
