"""A causal LM with a KV cache, fed in chunks: what every runner is.

    runner = open_runner(bundle)
    logits = runner.logits([1, 42, 7])           # float32 [3, vocab]
    for token in runner.generate([1, 42, 7], max_new_tokens=20): ...

A prompt is fed as a sum of the program's lengths, largest first (77 = 64 + 8 + 5 x 1): nothing is
padded, so the last row of each chunk is always a real token's. A program that takes every length is
fed the rest of a prompt at once, and so is one whose only length is longer: its method pads.
"""

from __future__ import annotations

import itertools
import operator
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Literal, SupportsIndex, final

import torch

from llm_coreml.errors import ConfigError
from llm_coreml.heads import LOGITS, Head
from llm_coreml.printable import printable, whole
from llm_coreml.runtime.sampling import Sampler

# Why a text ends: a stop token, the count that was asked for, or a full cache.
Finish = Literal["stop", "length", "context"]


def split_lengths(count: int, lengths: Sequence[int], *, ranged: bool = False) -> list[int]:
    """Write `count` as a sum of `lengths`, largest first, and of what is left.

    Args:
        count: Tokens.
        lengths: What a call takes.
        ranged: Those between the first and the last are taken, too.
    """
    parts: list[int] = []
    for length in [max(lengths)] if ranged else sorted(lengths, reverse=True):
        parts += [length] * (count // length)
        count %= length
    return [*parts, count] if count else parts


class Runner(ABC):
    """A causal LM with a KV cache, fed in chunks.

    Attributes:
        context: Positions that the cache holds.
        seq_lengths: Chunk lengths that one call accepts, ascending. If 1 is not among them, shorter
            chunks are accepted, too.
        ranged: Those between the first and the last are accepted, too.
        vocab_size: Width of the logits.
        every_row: A call returns a row for every token, not only for the last.
        label: What produced the numbers, for tables: `reference runtime`, `eager`...
        rewinds: How many positions behind the furthest one a sequence can be taken up again; None
            from its beginning on. Layers with windows forget what is before.
        head: What the program gives of a row. Logits that it does not give are -inf here.
    """

    context: int
    seq_lengths: tuple[int, ...]
    vocab_size: int
    every_row: bool
    label: str
    rewinds: int | None = None
    ranged: bool = False
    head: Head = LOGITS

    def __init__(self) -> None:
        self.position = 0
        # How many positions have been written to since the cache was empty.
        self._written = 0
        # The tokens in the cache; positions that no token was read at are -1.
        self._read: list[int] = []
        # How often the sequence was begun anew, or from an earlier position.
        self._begun = 0

    @abstractmethod
    def _forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Run one chunk: int64 `[1, S]`, int64 `[1]` -> float `[1, 1 or S, vocab]`."""

    @abstractmethod
    def _clear(self) -> None:
        """Empty the cache."""

    @final
    def reset(self, position: int = 0) -> None:
        """Forget the sequence; the next token is read at `position`, after that many zeros."""
        self._clear()
        self._begin(position)
        self._written = position
        self._read = [-1] * position

    @final
    def rewind(self, position: int) -> None:
        """Go on at an earlier `position`: what the cache holds behind it is masked, then replaced.

        Raises:
            ConfigError: the sequence is not that long, or what was before is forgotten.
        """
        if not 0 <= position <= self.position:
            raise ConfigError(
                f"The sequence is {self.position} tokens long; go back to 0 to {self.position}, "
                f"not to {position}."
            )
        if not self._remembers(position):
            raise ConfigError(
                f"{self._written} positions have been written, and layers with a window remember "
                f"what is needed to go on from the last {self.rewinds} of them; going back to "
                f"{position} takes reading the sequence again."
            )
        self._begin(position)
        del self._read[position:]

    def _remembers(self, position: int) -> bool:
        """Return whether the cache still holds what a token at `position` sees."""
        return position == 0 or self.rewinds is None or self._written - position <= self.rewinds

    @final
    def resume(self, position: int, states: Mapping[str, torch.Tensor]) -> None:
        """Go on at `position`, with what the program is to remember of the tokens before it.

        Args:
            position: Of the next token.
            states: Every state by name, of the sizes that the program declares, any float type.

        Raises:
            ArtifactError: the program has other states.
            ConfigError: the runtime lets nobody set them.
        """
        self._restore(states)
        self._begin(position)
        self._written = position
        self._read = [-1] * position

    def _begin(self, position: int) -> None:
        self.position = position
        self._begun += 1

    def _restore(self, states: Mapping[str, torch.Tensor]) -> None:
        """Fill the cache."""
        raise ConfigError(f"Nobody can set what a program remembers on this runtime: {self.label}.")

    @final
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed one chunk, whose length is one of `seq_lengths`, at the current position.

        Returns:
            float32 `[S, vocab]` when `every_row`, else `[1, vocab]`.

        Raises:
            ConfigError: a token outside the vocabulary, or the context is full.
        """
        numbers = [self._checked(token) for token in tokens]
        self._check_room(len(numbers))
        chunk = torch.tensor([numbers], dtype=torch.int64)
        logits = self._forward(chunk, torch.tensor([self.position], dtype=torch.int64))
        self.position += len(numbers)
        self._written = max(self._written, self.position)
        self._read += numbers
        return logits[0].to(torch.float32)

    def _checked(self, token: SupportsIndex) -> int:
        """Return a token as a plain number. Raises ConfigError if it is none of the model's."""
        try:
            number = operator.index(token)
        except TypeError:
            raise ConfigError(
                f"Token {printable(repr(token), 60)} is no whole number; give the ids that a "
                "tokenizer makes of a text."
            ) from None
        if not 0 <= number < self.vocab_size:
            raise ConfigError(
                f"Token {whole(number)} is outside the vocabulary of {self.vocab_size} entries; "
                "use the tokenizer that belongs to the model."
            )
        return number

    def _check_room(self, count: int) -> None:
        if self.position + count > self.context:
            raise ConfigError(
                f"{self.position} tokens are in the cache and {count} more do not fit its "
                f"{self.context} positions; give fewer, or export with a larger --context."
            )

    @final
    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Continue the sequence by `tokens` and return the last row, float32 `[vocab]`."""
        if not tokens:
            raise ConfigError("There are no tokens to feed; give at least one.")
        self._check_room(len(tokens))
        row, start = torch.empty(0), 0
        for length in split_lengths(len(tokens), self.seq_lengths, ranged=self.ranged):
            row = self.step(tokens[start : start + length])[-1]
            start += length
        return row

    @final
    def logits(self, tokens: Sequence[int], position: int = 0) -> torch.Tensor:
        """Return the logits after every one of `tokens`, from an empty cache.

        A program that returns last rows only is fed one token at a time.

        Args:
            tokens: The sequence.
            position: Where its first token is read, see `reset`.

        Returns:
            float32 `[len(tokens), vocab]`.

        Raises:
            ConfigError: a token outside the vocabulary, more than fit, or the program chooses
                among its logits.
        """
        self.check_every_logit()
        self.reset(position)
        self._check_room(len(tokens))
        rows = list(self._rows_of(tokens))
        return torch.cat(rows) if rows else torch.empty(0, self.vocab_size)

    def _rows_of(self, tokens: Sequence[int]) -> Iterator[torch.Tensor]:
        """Read `tokens` in calls that give a row for each, and yield what each call gives."""
        lengths = self.seq_lengths if self.every_row else (1,)
        start = 0
        for length in split_lengths(len(tokens), lengths, ranged=self.ranged and self.every_row):
            yield self.step(tokens[start : start + length])
            start += length

    @final
    def check_every_logit(self) -> None:
        """Refuse a program that gives the likeliest tokens alone.

        Raises:
            ConfigError: as said.
        """
        if self.head.count is not None:
            raise ConfigError(
                f"The program has --head {self.head} and gives {self.head.count} of "
                f"{self.vocab_size} logits; what is asked for needs all of them. Export the same "
                "with --head logits, which computes them alike, and ask that."
            )

    @final
    def take_up(self, tokens: Sequence[int]) -> int:
        """Keep what the cache holds of the beginning of `tokens`, and forget the rest.

        Returns:
            How many of them need not be read again, never the last; 0 where what was before is
            forgotten, and the cache is empty.
        """
        kept = self._shared(tokens)
        if kept and self._remembers(kept):
            self.rewind(kept)
            return kept
        self.reset()
        return 0

    @final
    def rows_after(self, tokens: Sequence[int], count: int) -> torch.Tensor:
        """Return the logits after each of the last `count` of `tokens`, which begin a text.

        What the cache holds of their beginning is not read again.

        Args:
            tokens: The text, at least `count` long.
            count: How many rows are wanted, at least one.

        Returns:
            float32 `[count, vocab]`.

        Raises:
            ConfigError: as `logits` says.
        """
        self.check_every_logit()
        first = len(tokens) - count
        start = self.take_up(tokens[: first + 1])
        self._check_room(len(tokens) - start)
        if not self.every_row and start < first:
            self.feed(tokens[start:first])
            start = first
        rows = []
        for read in self._rows_of(tokens[start:]):
            # A chunk's rows before the first are of no use, and take much memory.
            rows.append(read[max(0, first - start) :])
            start += len(read)
        return torch.cat(rows)

    @final
    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[int] = (),
        sampler: Sampler | None = None,
        reuse: bool = False,
    ) -> Generator[int, None, Finish]:
        """Yield new tokens after `tokens`, until a stop token, the count or a full cache.

        Args:
            tokens: The prompt.
            max_new_tokens: Most tokens to yield.
            stop: Tokens that end the text; not yielded.
            sampler: How a token is chosen; None takes the most likely.
            reuse: Keep what the cache holds of the prompt's beginning, and read the rest, where the
                runner still remembers enough of it; else the cache is emptied first.

        Returns:
            Why it ended.

        Raises:
            ConfigError: the prompt is no sequence of tokens that fits the context, the cache was
                used for something else before the text has ended, or there is nothing to draw from.
        """
        sampler = sampler or Sampler()
        if self.head.count == 1 and not sampler.greedy:
            raise ConfigError(
                f"The program has --head {self.head} and gives the likeliest token alone, of which "
                "none can be drawn; leave the temperature at 0, or export with --head topk:40."
            )
        kept = self.take_up(tokens) if reuse else 0
        if not reuse:
            self.reset()
        row = self.feed(tokens[kept:])
        for count in range(1, max_new_tokens + 1):
            token = sampler.choose(row)
            if token in stop:
                return "stop"
            before = (self._begun, self.position)
            yield token
            if count == max_new_tokens:
                break
            if (self._begun, self.position) != before:
                raise ConfigError(
                    "The model has read something else since this text was begun, and has one "
                    "cache; end one text before the next, or load the bundle again for each."
                )
            if self.position == self.context:
                return "context"
            row = self.step([token])[-1]
        return "length"

    def _shared(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens`, not the last, the cache holds at its beginning."""
        pairs = zip(self._read, tokens[:-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
