"""Libraries that panic, which is no Exception of Python: wherever a foreign tokenizer is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import transformers
from tokenizers.pre_tokenizers import FixedLength
from transformers import PreTrainedTokenizerFast

from exported import make_model, make_tokenizer
from llm_coreml.bundle.bundled_tokenizer import write_tokenizer
from llm_coreml.checkpoint import gguf_tokenizer
from llm_coreml.errors import CheckpointError
from llm_coreml.model import open_model
from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.comparison import load_source
from llm_coreml.tokenizer.convert import convert
from llm_coreml.tokenizer.failures import raised_as

TOLD = "chunk size must be non-zero"


def panic(*_: Any, **__: Any) -> NoReturn:
    """Let the native library panic; it tells of that on stderr as well."""
    FixedLength(length=0).pre_tokenize_str("a")
    pytest.fail("the library does not panic any more; use another of its faults")


def test_a_panic_is_no_exception() -> None:
    try:
        panic()
    except BaseException as error:
        assert not isinstance(error, Exception) and TOLD in str(error)


@pytest.mark.parametrize("asked", ["encode", "decode", "added_tokens_decoder"])
def test_a_source_that_panics_is_not_compared(asked: str, tmp_path: Path) -> None:
    way = property(panic) if asked == "added_tokens_decoder" else panic
    kind = type("Panicking", (PreTrainedTokenizerFast,), {asked: way})
    plain = make_tokenizer()
    # Saved as it should be, and asked afterwards.
    live = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    model = open_model(make_model(), live)
    live.__class__ = kind
    live.save_pretrained = lambda folder: plain.save_pretrained(folder)
    notes: list[str] = []
    assert write_tokenizer(model, tmp_path, notes.append)[1] == (1,)
    (note,) = notes
    assert note.startswith("The tokenizer was not compared with transformers', which fails")
    assert TOLD in note
    assert Tokenizer(tmp_path / "tokenizer.json").encode("The quick")


def test_a_live_tokenizer_that_panics_when_it_is_saved(tmp_path: Path) -> None:
    kind = type("Panicking", (PreTrainedTokenizerFast,), {"save_pretrained": panic})
    live = kind(tokenizer_object=make_tokenizer().backend_tokenizer)
    notes: list[str] = []
    write_tokenizer(open_model(make_model(), live), tmp_path, notes.append)
    (note,) = notes
    assert f"not read or write text: The Panicking cannot be saved: {TOLD}" in note


def _convert(folder: Path) -> None:
    convert(bundled_model(), folder / "tokenizer.json", {})


def _of_gguf(folder: Path) -> None:
    named = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": {}}
    gguf_tokenizer.write_tokenizer(folder / "model.gguf", named, folder)


@pytest.mark.parametrize("read", [_convert, _of_gguf])
def test_a_reader_of_transformers_that_panics(
    read: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reader in (transformers.AutoTokenizer, PreTrainedTokenizerFast):
        monkeypatch.setattr(reader, "from_pretrained", panic)
    with pytest.raises(CheckpointError, match=TOLD):
        read(tmp_path)
    assert load_source(bundled_model()) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_passes(error: type[BaseException]) -> None:
    with pytest.raises(error), raised_as(lambda _: ValueError("ours"), but=(MemoryError,)):
        raise error
