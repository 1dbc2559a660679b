"""Text of others, made fit to print: names in a file, words of a user, what a model wrote.

printable(name)      # one line of bounded length: an escape character is printed as x1b
whole(10**9999)      # "a number of 10000 digits"
harmless(answer)     # line ends and emoji stay, but nothing that a terminal obeys

Whatever reaches a terminal, a log or a model card from a file or from a command goes through here.
"""

from __future__ import annotations

import math
import unicodedata

# A whole message, and a cell of a table: each may list a few names.
MESSAGE = 1000
CELL = 2000
_CUT = " ... "
_DIGITS = 60
# They turn the order of all that follows on the line.
_TURNING = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def printable(text: str, limit: int = 300) -> str:
    """Return `text` on one line, every character that is none to print as its escape.

    Those are control characters and line ends, marks of direction and others without width, lone
    surrogates, and all spaces but the plain one.

    Args:
        text: Any text, of any length.
        limit: Most characters to return; the middle of a longer text is left out.
    """
    # Both ends, before any work is done on what lies between.
    ends = text if len(text) <= 2 * limit else text[:limit] + text[-limit:]
    shown = "".join(letter if letter.isprintable() else _escape(letter) for letter in ends)
    if len(shown) <= limit:
        return shown
    tail = (limit - len(_CUT)) // 3
    return shown[: limit - len(_CUT) - tail] + _CUT + shown[len(shown) - tail :]


def harmless(text: str) -> str:
    """Return a text of several lines without what a terminal obeys, each such character escaped.

    Line ends, tabs, joined emoji and scripts that run from right to left stay as they are. It can
    be called piece by piece: a character is judged alone.
    """
    return "".join(_escape(letter) if _obeyed(letter) else letter for letter in text)


def whole(value: int) -> str:
    """Return a whole number in digits, or how many it has: Python writes out no thousands."""
    if abs(value) < 10**_DIGITS:
        return str(value)
    return f"a number of {math.floor(value.bit_length() * math.log10(2)) + 1} digits"


def _obeyed(letter: str) -> bool:
    if letter in "\n\t":
        return False
    return unicodedata.category(letter) in ("Cc", "Cs") or letter in _TURNING


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
