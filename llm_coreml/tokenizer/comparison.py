"""A bundle's tokenizer against the one that it was made from, on a battery of texts.

difference = compare(Tokenizer(Path("out/tokenizer.json")), source)
beginning = beginning_of(source)                 # (1,)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_coreml.tokenizer.battery import TEXTS
from llm_coreml.tokenizer.failures import raised_as
from llm_coreml.tokenizer.text_tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Special tokens that are put into a text, of the hundreds that there may be.
_SPECIALS = 16
# Read by any tokenizer of these.
_PROBE = "Hello, world!"


class SourceError(Exception):
    """The source itself fails on a text; the message says how."""


def _asked() -> contextlib.AbstractContextManager[None]:
    return raised_as(lambda error: SourceError(str(error)))


@dataclass(frozen=True)
class Difference:
    """The first text that two tokenizers read or write differently.

    Attributes:
        text: It.
        found: What the bundle's makes of it.
        wanted: What its source makes of it.
        count: How many texts of the battery differ.
    """

    text: str
    found: list[int] | str
    wanted: list[int] | str
    count: int

    @property
    def reads(self) -> bool:
        """Whether the ids differ, and not only what is written for the same ids."""
        return isinstance(self.found, list)

    def __str__(self) -> str:
        return (
            f"{self.count} texts of {len(TEXTS)} and more, such as {self.text[:40]!r}: "
            f"{_short(self.found)}, not {_short(self.wanted)}"
        )


def _short(value: list[int] | str) -> str:
    return repr(value) if len(value) <= 12 else f"{value[:12]!r}..."


def load_source(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in `folder` as transformers reads it, None where it cannot.

    None of its own code is run.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        with _asked():
            loaded = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except SourceError:
        return None
    return loaded if isinstance(loaded, PreTrainedTokenizerBase) else None


def compare(found: Tokenizer, wanted: PreTrainedTokenizerBase) -> Difference | None:
    """Read and write the battery, and the source's special tokens, with both tokenizers.

    Returns:
        The first difference, or None.

    Raises:
        SourceError: the source fails, as transformers may where its settings are odd.
    """
    with _asked():
        added = [str(token) for token in wanted.added_tokens_decoder.values() if token.special]
        names = list(dict.fromkeys([*map(str, wanted.all_special_tokens), *added]))[:_SPECIALS]
    # A name that is no text, with half of a surrogate pair, is nowhere read.
    names = [name for name in names if name.encode(errors="ignore").decode() == name]
    texts = [*TEXTS, *names, *(f"a{name} b" for name in names)]
    differences = [pair for text in texts if (pair := _differing(found, wanted, text)) is not None]
    if not differences:
        return None
    text, ours, theirs = differences[0]
    return Difference(text, ours, theirs, len(differences))


def beginning_of(wanted: PreTrainedTokenizerBase) -> tuple[int, ...] | None:
    """Return the tokens that the source puts before a text; None where that cannot be told.

    Raises:
        SourceError: the source fails.
    """
    plain, marked = (_read(wanted, _PROBE, special) for special in (False, True))
    places = [at for at in range(len(marked)) if marked[at : at + len(plain)] == plain]
    return tuple(marked[: places[0]]) if plain and places else None


def _read(wanted: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    with _asked():
        found: Sequence[int] = wanted.encode(text, add_special_tokens=special, verbose=False)
        return list(found)


def _differing(
    found: Tokenizer, wanted: PreTrainedTokenizerBase, text: str
) -> tuple[str, list[int] | str, list[int] | str] | None:
    ours, theirs = found.encode(text), _read(wanted, text, special=False)
    with _asked():
        written = {special: _written(wanted, ours, special) for special in (False, True)}
    if ours != theirs:
        return text, ours, theirs
    for special, expected in written.items():
        if (read := found.decode(ours, special)) != expected:
            return text, read, expected
    return None


def _written(wanted: PreTrainedTokenizerBase, ids: list[int], special: bool) -> str:
    return str(
        wanted.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    )
