"""Text from tokens as they come: never half a character, and in sum what the whole decodes to.

detokenizer = Detokenizer(tokenizer, after=prompt_ids)
for token in tokens:
    print(detokenizer.add(token), end="")
print(detokenizer.end())
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from llm_coreml.tokenizer.text_tokenizer import Tokenizer

# What a decoder writes for bytes that are no character, or not yet.
_UNFINISHED = "\ufffd"
# Tokens by which a decoder that revises may come back to a text.
_LAG = 3


class Detokenizer:
    """Decodes a sequence that grows by a token at a time.

    Everything is decoded anew for each token, since what a token writes depends on those before
    it: a first word loses its space, a byte is part of a character. Text is told once no later
    token can change it.

    Args:
        tokenizer: Decodes.
        after: Tokens that stand before; their text is not told.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(after)
        self._told = tokenizer.decode(self._tokens) if after else ""
        self._before = len(after)

    def add(self, token: int) -> str:
        """Return the text that is certain now and was not before `token`; it may be empty."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if self._tokenizer.revises:
            kept = self._tokens[: max(self._before, len(self._tokens) - _LAG)]
            text = _common_start(text, self._tokenizer.decode(kept))
        return self._tell(text.rstrip(_UNFINISHED))

    def end(self) -> str:
        """Return the rest, unfinished characters as U+FFFD."""
        return self._tell(self._tokenizer.decode(self._tokens))

    def _tell(self, text: str) -> str:
        """Return what `text` adds to what was told; bytes may unmake a character told before."""
        new = text[len(self._told) :]
        if new:
            self._told = text
        return new


def _common_start(first: str, second: str) -> str:
    pairs = zip(first, second, strict=False)
    count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return first[:count]
