"""The tokenizer that an export writes: what its files forget, what they lose, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from exported import make_model, make_tokenizer, save_model
from llm_coreml.bundle.bundled_tokenizer import write_tokenizer
from llm_coreml.errors import CheckpointError, ConfigError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.tokenizer import Tokenizer

Edit = Callable[[dict[str, Any]], None]
TURNS = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{{ '</s>' }}\n{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", make_model())


def edit(path: Path, change: Edit) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def written(source: Any, draft: Path, tokenizer: Any = None) -> tuple[tuple[int, ...], list[str]]:
    """Write the tokenizer of `source`, and return the end tokens and the notes."""
    draft.mkdir()
    notes: list[str] = []
    _, eos = write_tokenizer(open_model(source, tokenizer), draft, notes.append)
    return eos, notes


def test_nothing_is_said_of_a_plain_tokenizer(model: Path, tmp_path: Path) -> None:
    assert written(model, tmp_path / "out") == ((1,), [])


def test_the_tokenizers_end_is_the_programs(model: Path, tmp_path: Path) -> None:
    edit(model / "tokenizer_config.json", lambda value: value.update(eos_token="<s>"))
    eos, (note,) = written(model, tmp_path / "out")
    assert eos == (1, 0) and "also ends with '<s>' (0)" in note and "own, it ends with [1]" in note


def test_a_templates_end_of_turn_is_the_programs(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text(TURNS)
    edit(model / "config.json", lambda value: value.update(eos_token_id=7))
    (model / "generation_config.json").unlink()
    edit(model / "tokenizer_config.json", lambda value: value.pop("eos_token"))
    eos, (note,) = written(model, tmp_path / "out")
    assert eos == (7, 1) and "'</s>' (1)" in note


def test_a_template_that_is_broken_is_told(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for %}")
    eos, (note,) = written(model, tmp_path / "out")
    assert eos == (1,) and note.startswith("Chats will not work: The chat template cannot be used")


def test_ends_beyond_the_vocabulary_are_left_out(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").unlink()
    edit(model / "config.json", lambda value: value.update(eos_token_id=[1, 300, 2**70]))
    eos, (note,) = written(model, tmp_path / "out")
    assert eos == (1,) and "beyond the vocabulary of 300" in note


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(UnsupportedError, match="outside of its folder"):
        written(model, tmp_path / "out")
    assert not any("password" in file.read_text() for file in (tmp_path / "out").iterdir())


def test_the_hubs_cache_links_to_its_own_blobs(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "commit"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(model.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert written(snapshot, tmp_path / "out") == ((1,), [])


def test_a_tokenizer_that_cannot_read_goes_without_text(model: Path, tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
    edit(model / "tokenizer.json", lambda value: value.update(model=words, added_tokens=[]))
    _, (note,) = written(model, tmp_path / "out")
    assert note.startswith("The bundle will not read or write text: The tokenizer cannot be used")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small = save_model(tmp_path / "model", make_model(vocab_size=200))
    with pytest.raises(CheckpointError, match="and the model has 200; use the tokenizer"):
        written(small, tmp_path / "out")


def test_tokens_that_no_text_needs_may_be_too_many(model: Path, tmp_path: Path) -> None:
    extra = {"id": 300, "content": "<pad>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    edit(
        model / "tokenizer.json",
        lambda value: value["added_tokens"].append({**extra, **flags}),
    )
    _, notes = written(model, tmp_path / "out")
    assert notes == [
        "The tokenizer has 301 tokens and the model 300: text that needs the others cannot be read."
    ]


def test_a_difference_from_transformers_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text.strip(" ")))
    _, (note,) = written(model, tmp_path / "out")
    assert "and transformers' differ: " in note and "such as ' leading'" in note


def test_another_beginning_than_transformers_is_told(tmp_path: Path) -> None:
    """A live tokenizer of Python code may put tokens before a text that no file knows of."""

    class Beginning(PreTrainedTokenizerFast):
        def encode(self, text: Any, add_special_tokens: bool = True, **settings: Any) -> list[int]:
            ids = super().encode(text, add_special_tokens=False, **settings)
            return [0, 1, *ids] if add_special_tokens else ids

    plain = make_tokenizer()
    live = Beginning(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    _, (note,) = written(make_model(), tmp_path / "out", live)
    begins = Tokenizer(tmp_path / "out" / "tokenizer.json").beginning
    assert "begins a text with the tokens [0, 1]" in note
    assert f"tokenizer.json with {list(begins)}, as" in note and begins != (0, 1)


@pytest.mark.parametrize("odd", ["long", {}, -1, None])
def test_settings_that_transformers_stumbles_over(odd: object, model: Path, tmp_path: Path) -> None:
    edit(model / "tokenizer_config.json", lambda value: value.update(model_max_length=odd))
    _, notes = written(model, tmp_path / "out")
    assert all("was not compared with transformers'" in note for note in notes)


def test_a_special_token_that_is_no_text(model: Path, tmp_path: Path) -> None:
    edit(model / "tokenizer_config.json", lambda value: value.update(eos_token="\ud800"))
    written(model, tmp_path / "out")


def test_a_conversion_that_loses_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encode(self, text.strip(" ")))
    with pytest.raises(CheckpointError, match="without a loss"):
        written(make_model(), tmp_path / "out", make_tokenizer())


@pytest.mark.parametrize("kind", ["folder", "text", "file", "native", "transformers"])
def test_live_tokenizers(kind: str, model: Path, tmp_path: Path) -> None:
    given = {
        "folder": model,
        "text": str(model),
        "file": model / "tokenizer.json",
        "native": make_tokenizer().backend_tokenizer,
        "transformers": make_tokenizer(),
    }[kind]
    assert written(make_model(), tmp_path / "out", given) == ((1,), [])
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.prompt("The quick") == make_tokenizer()("The quick")["input_ids"]


@pytest.mark.parametrize("given", [object, 7, "no/such", Path("none"), b"bytes"], ids=str)
def test_what_is_no_tokenizer_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer is .*give"):
        open_model(make_model(), given)
