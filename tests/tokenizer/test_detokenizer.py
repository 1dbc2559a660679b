"""Pieces of a text as tokens come: in sum the text of all, and none that a later one changes."""

from __future__ import annotations

import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.convert import convert
from llm_coreml.tokenizer.detokenizer import Detokenizer

TEXT = "The with statement wraps a block. Größe 😀 你好 e\u0301\n  two"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A sentencepiece model with bytes, whose decoder takes a first space away."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(["The with statement wraps a block."] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    convert(folder, folder / "tokenizer.json", {})
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A WordPiece tokenizer, whose decoder takes back the space before a comma."""
    names = ["[UNK]", "do", "not", "n", "'", "t", ",", ".", "we", "##s", "you"]
    model = tokenizers.models.WordPiece(dict(zip(names, range(11), strict=True)), unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(path))
    return Tokenizer(path)


def told(tokenizer: Tokenizer, after: list[int], tokens: list[int]) -> list[str]:
    """What is told for each of `tokens`, and at the end."""
    detokenizer = Detokenizer(tokenizer, after)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.end()]


def test_a_word_keeps_its_space_after_a_prompt(pieces: Tokenizer) -> None:
    tokens = pieces.encode(TEXT)
    assert pieces.decode(pieces.encode("with")) == "with"  # alone it loses it
    for cut in range(1, len(tokens)):
        begun = pieces.decode(tokens[:cut])
        if not begun.endswith("\ufffd"):  # no prompt ends in half a character
            whole = begun + "".join(told(pieces, tokens[:cut], tokens[cut:]))
            assert whole == pieces.decode(tokens)


@pytest.mark.parametrize("text", [TEXT, "😀😀", "\ufffd told \ufffd", ""])
def test_no_character_is_split(text: str) -> None:
    tokenizer = Tokenizer(bundled_model() / "tokenizer.json")
    parts = told(tokenizer, [], tokenizer.encode(text))
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_half_a_character_at_the_end_is_told() -> None:
    tokenizer = Tokenizer(bundled_model() / "tokenizer.json")
    tokens = tokenizer.encode("a😀")[:-1]
    assert "".join(told(tokenizer, [], tokens)) == tokenizer.decode(tokens)
    assert tokenizer.decode(tokens).endswith("\ufffd")


@given(st.lists(st.integers(0, 4095), max_size=30), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_any_tokens_of_a_byte_level_model(tokens: list[int], cut: int) -> None:
    tokenizer = Tokenizer(bundled_model() / "tokenizer.json")
    before, after = tokens[:cut], tokens[cut:]
    begun = tokenizer.decode(before)
    whole = tokenizer.decode(tokens)
    if whole.startswith(begun):  # else the first new token ends a character of the prompt
        assert begun + "".join(told(tokenizer, before, after)) == whole


@given(st.lists(st.integers(1, 10), max_size=12))
@settings(max_examples=100, deadline=None)
def test_any_tokens_of_a_decoder_that_revises(words: Tokenizer, tokens: list[int]) -> None:
    assert words.revises
    assert "".join(told(words, [], tokens)) == words.decode(tokens)


def test_text_comes_at_once(words: Tokenizer) -> None:
    byte_level = Tokenizer(bundled_model() / "tokenizer.json")
    assert not byte_level.revises
    tokens = byte_level.encode("The with statement")
    assert told(byte_level, [], tokens) == [*(byte_level.decode([each]) for each in tokens), ""]
    path = json.loads((bundled_model() / "tokenizer.json").read_text())
    assert path["decoder"]["type"] == "ByteLevel"
    assert words.decode([1, 2]) == "do not" and words.decode([1, 6]) == "do,"
