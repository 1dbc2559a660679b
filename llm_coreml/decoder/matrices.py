"""Matrices: a linear layer, and tables of tokens and positions, without weights at first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llm_coreml.decoder.eight_bit import EightBit


def number(value: float | None, without: float | None) -> torch.Tensor | None:
    """Return a number of a spec as a tensor `[1]`, None where it is `without`, which does nothing.

    A buffer is rounded in the eager decoder as it is in a program; a Python number would not be.
    """
    return None if value == without else torch.tensor([value])


def beside(number: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a number on the device of `x`; in an exported graph it is there, and no operation."""
    return number if number.device == x.device else number.to(x.device)


class Linear(nn.Linear):
    """A linear layer without weights at first, which may then be stored narrower than it computes.

    A 16-bit weight is widened for each call, so a model never stands in fp32 as a whole.

    Attributes:
        input_order: int32 `[in_features]`, which input each column of the weight belongs to, where
            columns were sorted by group; None is its own.
        entering: Rounds the inputs to 8 bits; None leaves them as they are.
        leaving: The same for the outputs.
        down: fp16 `[rank, in_features]`, of what is computed beside the weight; None is nothing.
        up: fp16 `[out_features, rank]`, the other factor of it.
    """

    input_order: torch.Tensor | None
    entering: EightBit | None
    leaving: EightBit | None
    down: nn.Parameter | None
    up: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self.entering = None
        self.leaving = None
        self.register_buffer("input_order", None, persistent=False)
        self.register_parameter("down", None)
        self.register_parameter("up", None)

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` `[..., in_features]` in the order of the weight's columns."""
        return x if self.input_order is None else torch.index_select(x, -1, self.input_order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x @ (weight + up @ down).T + bias` in the dtype of `x`."""
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        x = x if self.entering is None else self.entering(x)
        y = F.linear(x, weight, bias)
        if self.down is not None and self.up is not None:
            y = y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return y if self.leaving is None else self.leaving(y)


class SoftCap(nn.Module):
    """`cap * tanh(x / cap)`, by two factors that are the numbers that a program holds.

    A division by a number becomes a product with its inverse, rounded, in a program.

    Args:
        cap: What values stay below.
    """

    cap: torch.Tensor
    inverse: torch.Tensor

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.register_buffer("cap", torch.tensor([cap]), persistent=False)
        self.register_buffer("inverse", torch.tensor([1 / cap]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Cap every number of `x`."""
        return torch.tanh(x * beside(self.inverse, x)) * beside(self.cap, x)


class Embedding(nn.Embedding):
    """A token table without weights at first, which may be stored narrower than it computes."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim, device="meta")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows of int `tokens` `[1, S]` as float32 `[1, S, hidden]`."""
        return F.embedding(tokens, self.weight).to(torch.float32)


class PositionTable(nn.Module):
    """A table of learned positions, without values at first; no format but fp32 or fp16 holds it.

    Args:
        positions: How many there are.
        size: Width of the residual stream.
    """

    def __init__(self, positions: int, size: int) -> None:
        super().__init__()
        values = torch.empty(positions, size, device="meta")
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the rows of int `positions` `[S]` as float32 `[S, hidden]`."""
        return F.embedding(positions, self.weight).to(torch.float32)
