"""An eager decoder as a runner: the judge of the artifact that is made from it.

EagerRunner(decoder, "quantized").logits([1, 42, 7])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import final

import torch
import torch.nn.functional as F

from llm_coreml.decoder import Decoder
from llm_coreml.decoder.carried import Layout
from llm_coreml.decoder.matrices import Embedding
from llm_coreml.errors import ConfigError
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.runtime.runner import Runner, split_lengths


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

    def hidden(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return what the head is given after each of `tokens`, from an empty cache.

        Returns:
            float32 `[len(tokens), hidden]`; `logits_of` makes of it what `logits` returns.

        Raises:
            ConfigError: a token outside the vocabulary, or more than fit.
        """
        self.reset()
        self._check_room(len(tokens))
        numbers = torch.tensor([[self._checked(token) for token in tokens]], dtype=torch.int64)
        with torch.no_grad():
            rows = [
                self._hidden(numbers[:, start:end], torch.tensor([start]))[0]
                for start, end in self._calls(len(tokens))
            ]
        self.reset()
        return torch.cat(rows) if rows else torch.empty(0, self.decoder.spec.hidden_size)

    def logits_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits of rows that `hidden` gave, float32 `[rows, vocab]`."""
        with torch.no_grad():
            found = [self._head(rows[None, start:end])[0] for start, end in self._calls(len(rows))]
        return torch.cat(found) if found else torch.empty(0, self.vocab_size)

    def streams(
        self, tokens: Sequence[int], change: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield the residual stream after each block, float32 `[len(tokens), hidden]`.

        The tokens are all there is; what is in the cache stays there.

        Args:
            tokens: A text that fits the context.
            change: Makes what the next block gets of what a block gives.

        Raises:
            ConfigError: a token outside the vocabulary, or more than fit.
        """
        decoder, count = self.decoder, len(tokens)
        if count > self.context:
            raise ConfigError(f"{count} tokens do not fit a context of {self.context} positions.")
        numbers = torch.tensor([[self._checked(token) for token in tokens]], dtype=torch.int64)
        # Never while somebody else runs, who would find and leave the mode of another reader.
        with torch.no_grad():
            x = decoder.embed(numbers, torch.tensor([0]), look_up=_look_up)
            chunk = decoder.window(count)
        for index in range(len(decoder.spec.layers)):
            with torch.no_grad():
                x = decoder.block(index)(x, chunk)
                layout = Layout.of(decoder.spec, index + 1)
                carried = layout.taken_apart(x)
                if change is not None:
                    carried = replace(carried, stream=change(carried.stream))
                    x = layout.put_together(carried)
            yield carried.stream[0]

    def _calls(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield where calls begin and end that read so many tokens, as `logits` makes them."""
        lengths = split_lengths(count, self.seq_lengths, ranged=self.ranged)
        return itertools.pairwise(itertools.accumulate(lengths, initial=0))

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
