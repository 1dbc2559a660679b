"""Texts on which two tokenizers are compared: what is lost in a conversion shows on one of them.

encoded = [tokenizer.encode(text) for text in TEXTS]
"""

from __future__ import annotations

TEXTS = (
    "a",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    " leading",
    "   three leading",
    "trailing ",
    "trailing   ",
    " ",
    "    ",
    "two  spaces   and\tone tab\t\tand two",
    "\n",
    "line\nline\n\nparagraph\r\nend\n",
    "\n  indented",
    "I'm sure they'd've said it's HERS, isn't it ?",
    "0 1 12 123 1234 12345 3.14159 1,000,000 1e-9 0xff",
    "def add(a: int, b: int) -> int:\n    return a + b  # sum\n",
    '{"key": [1, null, true], "text": "a\\nb"}',
    "https://example.org/a_b-c?d=e&f=%20g#h user@example.org",
    "ALL CAPS camelCase snake_case kebab-case",
    "naïve café Ångström façade ﬁne ½ ² №",
    "e\u0301 a\u030a n\u0303 \u1e9b\u0323",
    "Привет, мир. \u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5.",
    "你好,世界。こんにちは世界 안녕하세요",
    "שלום עולם مرحبا بالعالم नमस्ते สวัสดี",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522 𐍈 𠜎",
    "\u00a0no-break\u2003em\u3000wide\u200bzero\u200djoin\ufefffeff",
    "\u2581lower block\u0120G\u010a",
    "\x00\x01\x07\x1b[0m\x7f",
    "\u202eright to left\u202c",
    "\ufffd replacement \ufffe \U0010ffff",
    "<s> </s> <unk> <|endoftext|> [INST] hi [/INST] <0x0A>",
    "a" * 300,
    "",
)
"""Spaces at every place, line ends, digits, code, scripts, combining marks, emoji, control and
private characters, what looks like a special token, and nothing."""
