"""Tokenizers as they are found: with leftovers of training, odd templates, or in another form."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from llm_coreml.errors import CheckpointError, ConfigError
from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.convert import convert
from llm_coreml.tokenizer.special_ids import special_ids

TEXT = "The with statement wraps the execution of a block with methods defined by a manager."


def edited(tmp_path: Path, **changes: object) -> Path:
    """The bundled tokenizer.json with some of its fields replaced."""
    tokenizer = json.loads((bundled_model() / "tokenizer.json").read_text())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**tokenizer, **changes}))
    return path


# As in Llama 3's tokenizer.model: bytes, and a few pieces that are longer.
RANKS = [bytes([octet]) for octet in range(256)] + [b"th", b"the", b" q", b"qu", b"er"]


def test_truncation_and_padding_are_left_out(tmp_path: Path) -> None:
    plain = Tokenizer(bundled_model() / "tokenizer.json")
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|end_of_text|>",
    }
    left_over = Tokenizer(edited(tmp_path, truncation=truncation, padding=padding))
    assert left_over.changed and not plain.changed
    assert len(plain.encode(TEXT)) > 4
    assert left_over.prompt(TEXT) == plain.prompt(TEXT)
    left_over.save(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None


def test_the_beginning_token_is_the_tokenizers_own(tmp_path: Path) -> None:
    assert Tokenizer(bundled_model() / "tokenizer.json").beginning == (0,)
    without = Tokenizer(edited(tmp_path, post_processor=None))
    assert without.beginning == ()
    assert without.prompt(TEXT) == without.encode(TEXT)


def test_a_beginning_may_be_two_tokens_as_in_glm(tmp_path: Path) -> None:
    names = ("<|begin_of_text|>", "<|end_of_text|>")
    special = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [*special, sequence],
        "pair": [*special, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [at], "tokens": [name]} for at, name in enumerate(names)
        },
    }
    path = edited(tmp_path, post_processor=processor)
    tokenizer = Tokenizer(path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path)).encode(TEXT)
    assert tokenizer.beginning == (0, 1)
    assert tokenizer.prompt(TEXT) == theirs
    assert tokenizer.prompt("".join(names) + TEXT) == theirs


def test_a_beginning_token_in_the_text_is_not_doubled() -> None:
    tokenizer = Tokenizer(bundled_model() / "tokenizer.json")
    rendered = f"<|begin_of_text|>{TEXT}"
    assert tokenizer.prompt(rendered) == tokenizer.encode(rendered) == tokenizer.prompt(TEXT)


def test_dropout_of_training_is_left_out(tmp_path: Path) -> None:
    model = json.loads((bundled_model() / "tokenizer.json").read_text())["model"]
    tokenizer = Tokenizer(edited(tmp_path, model={**model, "dropout": 0.9}))
    plain = Tokenizer(bundled_model() / "tokenizer.json")
    assert tokenizer.changed
    assert [tokenizer.encode(TEXT) for _ in range(3)] == [plain.encode(TEXT)] * 3


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(ConfigError, match=r"'\\ud83d' at 2, half of a surrogate"):
        Tokenizer(bundled_model() / "tokenizer.json").prompt("ab\ud83d")


@pytest.mark.parametrize("tokens", [[-1], [2**70], ["a"], [None]])
def test_what_is_no_token_is_not_decoded(tokens: list[int]) -> None:
    with pytest.raises(ConfigError, match="whole numbers"):
        Tokenizer(bundled_model() / "tokenizer.json").decode(tokens)


def tiktoken_folder(folder: Path) -> Path:
    lines = [f"{base64.b64encode(part).decode()} {rank}\n" for rank, part in enumerate(RANKS)]
    (folder / "tokenizer.model").write_text("".join(lines))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_tiktoken_ranks_of_llama_3_get_its_special_tokens(tmp_path: Path) -> None:
    first = len(RANKS)
    config = {"vocab_size": first + 256, "bos_token_id": first}
    told = convert(tiktoken_folder(tmp_path), tmp_path / "tokenizer.json", config)
    assert told is not None and "those of Llama 3 were added" in told
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.prompt("hello")[0] == first and tokenizer.size == first + 256
    # The ids that meta-llama/Llama-3.1-8B-Instruct gives them, from 128000 on.
    known = {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "eot_id": 9}
    for name, place in {**known, "reserved_special_token_247": 255}.items():
        assert tokenizer.encode(f"the<|{name}|>") == [257, first + place]


def test_tiktoken_ranks_of_another_model_are_told(tmp_path: Path) -> None:
    told = convert(tiktoken_folder(tmp_path), tmp_path / "out.json", {"vocab_size": len(RANKS)})
    assert told is not None and "holds no special tokens" in told
    assert Tokenizer(tmp_path / "out.json").special == {}


def test_a_sentencepiece_model_becomes_a_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n".join([TEXT] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=64,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    convert(tmp_path, tmp_path / "tokenizer.json", {})
    converted = Tokenizer(tmp_path / "tokenizer.json")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert converted.encode(TEXT) == model.encode(TEXT)
    assert converted.decode(converted.encode(TEXT)).strip() == TEXT


def test_files_that_are_no_tokenizer_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json' is no tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="cannot be turned into a tokenizer"):
        convert(tmp_path, tmp_path / "out.json", {})


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, {}, (1, (2,))),
        ({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [2, 7]}, (1, (2, 7))),
        ({"eos_token_id": [3]}, {}, (None, (3,))),
        ({}, {}, (None, ())),
    ],
)
def test_special_ids(
    config: dict[str, object],
    generation: dict[str, object],
    expected: tuple[int | None, tuple[int, ...]],
) -> None:
    assert special_ids(config, generation) == expected


@pytest.mark.parametrize("value", ["</s>", True, 1.5, [None], {"id": 1}])
def test_special_ids_are_tokens(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"eos_token_id is .*; it must be a token"):
        special_ids({"eos_token_id": value}, {})


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(bundled_model(), folder)
    plain = Tokenizer(bundled_model() / "tokenizer.json")
    assert Tokenizer(folder / "tokenizer.json").prompt(TEXT) == plain.prompt(TEXT)
