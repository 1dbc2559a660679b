"""What is given as the tokenizer of a live model: an object of one of two libraries, or a path.

save_live_tokenizer(tokenizers.Tokenizer.from_file("tokenizer.json"), Path("out"))
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from llm_coreml.checkpoint.checkpoint import TOKENIZER_FILES
from llm_coreml.checkpoint.links import refuse_foreign_link
from llm_coreml.errors import CheckpointError, ConfigError
from llm_coreml.tokenizer.failures import raised_as

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

_NAME = "tokenizer.json"


def check_live_tokenizer(given: Any) -> None:
    """Refuse what is no tokenizer and no path of one, before any work is done.

    Raises:
        ConfigError: as said.
    """
    if isinstance(given, (str, Path)):
        _files(Path(given))
    elif not _is_native(given) and not _is_transformers(given):
        raise ConfigError(
            f"tokenizer is a {type(given).__name__}; give a tokenizer of transformers, a "
            f"tokenizers.Tokenizer, or the path of a folder or of a {_NAME}."
        )


def save_live_tokenizer(given: Any, folder: Path) -> None:
    """Write the tokenizer's files into `folder`, which exists.

    Raises:
        ConfigError: it is none.
        CheckpointError: it cannot be saved.
        UnsupportedError: a file is a link out of its folder.
        OSError: a file cannot be written.
    """
    check_live_tokenizer(given)
    if isinstance(given, (str, Path)):
        for path in _files(Path(given)):
            refuse_foreign_link(path)
            shutil.copyfile(path, folder / path.name)
    elif _is_native(given):
        with _saving(given):
            text = given.to_str(pretty=True)
        (folder / _NAME).write_text(text, encoding="utf-8")
    elif _is_transformers(given):
        # It may write files of other names as well, its own code among them.
        with tempfile.TemporaryDirectory(prefix="llm-coreml-") as draft:
            with _saving(given):
                given.save_pretrained(draft)
            for name in TOKENIZER_FILES:
                if (Path(draft) / name).is_file():
                    shutil.copyfile(Path(draft) / name, folder / name)


def _saving(given: Any) -> contextlib.AbstractContextManager[None]:
    return raised_as(
        lambda error: CheckpointError(
            f"The {type(given).__name__} cannot be saved: {error}. Give the folder of its files "
            "instead."
        ),
        but=(OSError,),
    )


def _files(path: Path) -> list[Path]:
    """Return a tokenizer's files in a folder, or the one file. Raises ConfigError."""
    path = path.expanduser()
    if path.is_dir():
        names = [name for name in TOKENIZER_FILES if name != "generation_config.json"]
        found = [path / name for name in names if (path / name).is_file()]
        if {"tokenizer.json", "tokenizer.model", "vocab.json"} & {file.name for file in found}:
            return found
    elif path.is_file() and path.name == _NAME:
        return [path]
    raise ConfigError(
        f"tokenizer is '{path}', which is no folder with a {_NAME} and no such file; give one, or "
        "the tokenizer itself, as AutoTokenizer.from_pretrained(...) loads it."
    )


def _is_native(given: Any) -> TypeGuard[tokenizers.Tokenizer]:
    import tokenizers

    return isinstance(given, tokenizers.Tokenizer)


def _is_transformers(given: Any) -> TypeGuard[PreTrainedTokenizerBase]:
    from transformers import PreTrainedTokenizerBase

    return isinstance(given, PreTrainedTokenizerBase)
