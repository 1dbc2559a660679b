"""What a program gives for a row: every logit, or the likeliest tokens with theirs.

head = Head.of("topk:8")
head.count                   # 8; None where every logit is given
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llm_coreml.errors import ConfigError
from llm_coreml.printable import printable

_HEAD = re.compile(r"(?P<kind>logits|argmax|topk:(?P<count>[1-9][0-9]{0,5}))")


@dataclass(frozen=True)
class Head:
    """The last part of a program.

    Attributes:
        kind: `logits`, the whole row; `topk`, the largest ones and their tokens; `argmax`, the
            largest one and its token.
        count: How many tokens are given; None is all of the vocabulary.
    """

    kind: Literal["logits", "topk", "argmax"] = "logits"
    count: int | None = None

    @classmethod
    def of(cls, text: str) -> Head:
        """Return the head that a text such as `topk:8` names.

        Raises:
            ConfigError: it names none.
        """
        found = _HEAD.fullmatch(text.strip())
        if found is None:
            raise ConfigError(
                f"--head is '{printable(text, 40)}'; give logits, topk:K with the number of "
                "tokens, such as topk:40, or argmax."
            )
        if found["count"] is not None:
            return cls("topk", int(found["count"]))
        return cls("argmax", 1) if found["kind"] == "argmax" else cls()

    def __str__(self) -> str:
        return f"{self.kind}:{self.count}" if self.kind == "topk" else self.kind

    @property
    def gives(self) -> tuple[str, ...]:
        """The names of what is given of every row, in order."""
        return ("logits",) if self.count is None else ("values", "ids")


LOGITS = Head()


def checked_head(text: str) -> str:
    """Return a head as it is kept. Raises ConfigError if it is none."""
    return str(Head.of(text))
