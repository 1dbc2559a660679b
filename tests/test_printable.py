"""Text of others, before it reaches a terminal: one line, bounded, and nothing that one obeys."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_coreml.errors import ConfigError, LlmCoreMLError, nearest
from llm_coreml.printable import MESSAGE, harmless, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("Modèle 模型 モデル 🙂", "Modèle 模型 モデル 🙂"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("x\u202egpj.exe\u2066\u200f", r"x\u202egpj.exe\u2066\u200f"),
        ("zero\u200bwidth\ufeff\u2028", r"zero\u200bwidth\ufeff\u2028"),
        ("\ud800 \udcff", r"\ud800 \udcff"),
        ("\xa0\u3000", r"\xa0\u3000"),
    ],
)
def test_what_is_no_letter_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(), max_size=80), st.integers(20, 60))
def test_whatever_it_is_one_short_line_of_printable_text_comes_back(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit and shown.isprintable()
    shown.encode()  # no lone surrogate
    if text.isprintable() and len(text) <= limit:
        assert shown == text


def test_the_ends_of_a_long_text_are_kept() -> None:
    begun = time.process_time()
    shown = printable("The name '" + "\x1b" * 10**8 + "' is too long; give another.", 200)
    assert time.process_time() - begun < 5
    assert len(shown) == 200
    assert shown.startswith("The name '") and shown.endswith("' is too long; give another.")


def test_an_answer_keeps_its_lines_and_scripts() -> None:
    answer = (
        "# Title\n\n\tcode\n\U0001f469\u200d\U0001f467 \u05e9\u05dc\u200f 1\xa0000 \u06a9\u200c"
    )
    assert harmless(answer) == answer


@pytest.mark.parametrize(
    "letter", ["\x1b", "\x9b", "\r", "\x08", "\x00", "\x7f", "\u202e", "\u2067", "\udc80"]
)
def test_an_answer_gives_a_terminal_no_orders(letter: str) -> None:
    shown = harmless(f"a{letter}b\n")
    assert shown == f"a{letter.encode('unicode_escape').decode()}b\n"
    assert not any(unicodedata.category(each) in ("Cc", "Cs") for each in shown[:-1])


def test_every_error_is_a_printable_line() -> None:
    for kind in (LlmCoreMLError, *LlmCoreMLError.__subclasses__()):
        told = str(kind(f"'{chr(27)}[2J{chr(0xD800)}' is no name.\nGive another."))
        assert told == r"'\x1b[2J\ud800' is no name.\nGive another."
        assert len(str(kind("x" * 10**6))) == MESSAGE
    error = ConfigError("as before")
    assert str(error) == "as before" and error.args == ("as before",)


def test_a_long_name_has_no_nearest() -> None:
    begun = time.process_time()
    assert nearest("x" * 10**7, ["llama", "mistral"]) == ""
    assert nearest("lama" * 20000, ["llama", "llama" * 10000]) == ""
    assert time.process_time() - begun < 5
    assert nearest("lama", ["llama", "mistral"]) == " Did you mean 'llama'?"
