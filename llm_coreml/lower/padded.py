"""What a runner calls, around the program that computes: it takes any number of tokens.

A Core ML program takes a few lengths alone, and ExecuTorch's runners feed a prompt in one call of
its own length. So the method pads: the last token is repeated up to the next length. It does so
in ExecuTorch's own kernels, before the program, and tells it where the last real token is
(`Decoder.forward` says what comes of that).

    method = method_around(program, context=2048, lengths=(1, 8, 64, 512), every_row=False)
    logits = method(tokens, start_pos)       # int64 [1, S], S from 1 to 512; int64 [1]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from llm_coreml.decoder import Decoder

# `Decoder.forward`, or what stands for it: tokens, start_pos and last_pos, all int32 -> logits.
# `Carrying`: the same, and every cache -> a tuple of logits and every cache.
Program = Callable[..., Any]


class Carrying(nn.Module):
    """A decoder that is given its caches, and gives them back, as a program.

    Args:
        decoder: Its own states are left as they are.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: torch.Tensor,
        last_pos: torch.Tensor | None,
        *caches: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return logits and caches, see `Decoder.carrying`."""
        return self.decoder.carrying(tokens, start_pos, last_pos, caches)


class OneToken(nn.Module):
    """A method that takes one token at a time.

    Args:
        program: Called without a `last_pos`.
        context: Positions that there are.
    """

    positions: torch.Tensor

    def __init__(self, program: Program, context: int) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("positions", torch.arange(context, dtype=torch.int32))

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor, *caches: torch.Tensor) -> Any:
        """Return the logits of `tokens` int64 `[1, 1]` at `start_pos` int64 `[1]`.

        With caches, a tuple of the logits and of what becomes of each cache.
        """
        first = position(self.positions, start_pos)
        return self.program(tokens.to(torch.int32), first, None, *caches)


class Padded(nn.Module):
    """A method that takes any number of tokens, up to the longest length.

    Args:
        program: What it calls, with a number of tokens that is one of the lengths.
        context: Positions that there are.
        lengths: What the program takes, ascending; None if it takes every length.
        rows: How many of what the program gives, the first ones, have a row for every token.
    """

    positions: torch.Tensor

    def __init__(
        self, program: Program, context: int, lengths: Sequence[int] | None, rows: int
    ) -> None:
        super().__init__()
        self.program = program
        self.lengths = lengths
        self.rows = rows
        self.register_buffer("positions", torch.arange(context, dtype=torch.int32))

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor, *caches: torch.Tensor) -> Any:
        """Return the logits of `tokens` int64 `[1, S]` that begin at `start_pos` int64 `[1]`.

        With caches, a tuple of the logits and of what becomes of each cache.
        """
        count = tokens.shape[1]
        first = position(self.positions, start_pos)
        last = position(self.positions, start_pos + (count - 1))
        if self.lengths is None:
            return self.program(tokens.to(torch.int32), first, last, *caches)
        rows = torch.arange(padded_length(count, self.lengths)).clamp(max=count - 1)
        padded = tokens.index_select(1, rows).to(torch.int32)
        given = self.program(padded, first, last, *caches)
        if not self.rows:
            return given
        results = given if isinstance(given, tuple) else (given,)
        # No slice: torch does not know that there are at least so many.
        real = torch.arange(count)
        cut = [each.index_select(1, real) for each in results[: self.rows]]
        return (*cut, *results[self.rows :]) if len(results) > 1 else cut[0]


Method = OneToken | Padded


def method_around(
    program: Program, context: int, lengths: Sequence[int] | None, rows: int
) -> Method:
    """Return the method that calls `program`; see `Padded` for the arguments."""
    if lengths is not None and lengths[-1] == 1:
        return OneToken(program, context)
    return Padded(program, context, lengths, rows)


def padded_length(count: Any, lengths: Sequence[int]) -> Any:
    """Return the shortest of `lengths` that holds `count` tokens.

    Every length that is too short adds the step to the one after it, by the arithmetic that
    ExecuTorch has for sizes.

    Args:
        count: 1 to the longest length; a number, or a symbol while a program is traced.
        lengths: Ascending.
    """
    length: Any = lengths[0]
    for shorter, longer in pairwise(lengths):
        enough: Any = torch.sym_min((count - 1) // shorter, 1)  # type: ignore[no-untyped-call]
        length = length + (longer - shorter) * enough
    return length


def position(positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return int64 `index` `[1]` as int32.

    It is looked up, so that a position outside the context is refused by the kernel: a runner that
    goes on past the end gets an error, not the logits of a damaged cache.
    """
    return positions.index_select(0, index)
