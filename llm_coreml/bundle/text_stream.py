"""A text while it is made: pieces as they are certain, and at the end why it ended.

stream = model.stream("def add(a, b):")
for piece in stream:
    print(piece, end="")
stream.finish                                  # "stop", "length" or "context"
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import final

from llm_coreml.errors import ConfigError
from llm_coreml.runtime.runner import Finish
from llm_coreml.tokenizer.detokenizer import Detokenizer


@final
class TextStream(Iterator[str]):
    """Pieces of a text; none splits a character or shows a part of a stop text.

    Attributes:
        finish: Why the text ended, None while it has not: `stop`, a stop token or text; `length`,
            as many tokens as were asked for; `context`, the cache is full.
        prompt_tokens: How many tokens the prompt has.
        new_tokens: How many were made so far.

    Args:
        prompt_tokens: As said.
        tokens: Gives them, and at its end the reason.
        detokenizer: Writes them.
        stop: Texts that end it, see `stop_texts`; they are left out.
    """

    def __init__(
        self,
        prompt_tokens: int,
        tokens: Generator[int, None, Finish],
        detokenizer: Detokenizer,
        stop: Sequence[str] = (),
    ) -> None:
        self.finish: Finish | None = None
        self.prompt_tokens = prompt_tokens
        self.new_tokens = 0
        self._tokens = tokens
        self._detokenizer = detokenizer
        self._stop = stop
        self._pieces = self._make()

    def __next__(self) -> str:
        """Return the next piece, which is not empty."""
        return next(self._pieces)

    def _make(self) -> Iterator[str]:
        held = ""
        while True:
            finish: Finish | None = None
            try:
                held += self._detokenizer.add(next(self._tokens))
                self.new_tokens += 1
            except StopIteration as end:
                finish = end.value
                held += self._detokenizer.end()
            found = [at for text in self._stop if (at := held.find(text)) >= 0]
            if found:
                self._tokens.close()
                held, finish = held[: min(found)], "stop"
            kept = 0 if finish else _begun(held, self._stop)
            piece, held = held[: len(held) - kept], held[len(held) - kept :]
            self.finish = finish
            if piece:
                yield piece
            if finish:
                return


def stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return a text that ends another, or several, as several.

    Raises:
        ConfigError: one is empty, or no text.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise ConfigError("A stop text is empty or no text; give at least one letter.")
    return texts


def _begun(text: str, stop: Sequence[str]) -> int:
    """Return how many letters at the end of `text` may begin a stop text."""
    longest = max(map(len, stop), default=0)
    return next(
        (
            count
            for count in range(min(longest - 1, len(text)), 0, -1)
            if any(each.startswith(text[-count:]) for each in stop)
        ),
        0,
    )
