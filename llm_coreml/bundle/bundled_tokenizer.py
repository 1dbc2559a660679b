"""Puts a model's tokenizer into a bundle, and holds it against the one that it came from.

bos_id, eos_ids = write_tokenizer(model, Path("draft"), print)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_coreml.bundle.folder import TOKENIZER
from llm_coreml.checkpoint import Checkpoint
from llm_coreml.checkpoint.live import LiveCheckpoint
from llm_coreml.checkpoint.over_files import CheckpointOver
from llm_coreml.errors import CheckpointError, LlmCoreMLError
from llm_coreml.model import Model
from llm_coreml.tokenizer import Tokenizer
from llm_coreml.tokenizer.battery import TEXTS
from llm_coreml.tokenizer.comparison import SourceError, beginning_of, compare, load_source
from llm_coreml.tokenizer.convert import convert
from llm_coreml.tokenizer.special_ids import end_tokens, special_ids, within
from llm_coreml.tokenizer.trial import UnfitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Note = Callable[[str], None]


def write_tokenizer(model: Model, draft: Path, note: Note) -> tuple[int | None, tuple[int, ...]]:
    """Write the tokenizer's files, with a `tokenizer.json` among them if there is any way.

    Args:
        model: What is exported.
        draft: The bundle's folder.
        note: Told what a user should know.

    Returns:
        The beginning token, if there is one, and the tokens that end a text: those of the model's
        configuration, and those that only its tokenizer names.

    Raises:
        CheckpointError: the tokenizer is damaged, or of another model.
        UnsupportedError: a file of it is a link out of its folder.
        OutputError: a file cannot be written.
    """
    checkpoint, size = model.checkpoint, model.spec.vocab_size
    bos, named = special_ids(checkpoint.config, checkpoint.generation_config)
    bos, eos = next(iter(within([] if bos is None else [bos], size)), None), within(named, size)
    if len(eos) < len(named):
        note(f"End tokens beyond the vocabulary of {size} are left out of {list(named)}.")
    try:
        tokenizer = _written(checkpoint, draft, note)
    except UnfitError as error:
        (draft / TOKENIZER).unlink()
        note(f"The bundle will not read or write text: {error}")
        return bos, eos
    if tokenizer is None:
        return bos, eos
    _check_ids(tokenizer, size, note)
    if model.source.kind != "bundled":
        _compare(checkpoint, draft, tokenizer, note)
    return bos, _all_ends(draft, tokenizer, size, eos, note)


def _written(checkpoint: Checkpoint, draft: Path, note: Note) -> Tokenizer | None:
    """Return the tokenizer in the bundle, or None if there is none and the user was told."""
    try:
        checkpoint.save_tokenizer(draft)
        if not (draft / TOKENIZER).is_file():
            told = convert(_origin(checkpoint, draft), draft / TOKENIZER, checkpoint.config)
            if told is not None:
                note(told)
    except CheckpointError as error:
        note(f"The bundle will not read or write text: {error}")
        return None
    tokenizer = Tokenizer(draft / TOKENIZER)
    if tokenizer.changed:
        tokenizer.save(draft / TOKENIZER)
    return tokenizer


def _origin(checkpoint: Checkpoint, draft: Path) -> Path:
    """Return the folder of the source's own files; a live tokenizer's are those in the draft."""
    files = list(checkpoint.tokenizer_files.values())
    return files[0].parent if files else draft


def _check_ids(tokenizer: Tokenizer, size: int, note: Note) -> None:
    """Refuse a tokenizer whose plain texts have tokens that the model has not."""
    if tokenizer.size <= size:
        return
    for text in TEXTS:
        beyond = [token for token in tokenizer.encode(text) if token >= size]
        if beyond:
            raise CheckpointError(
                f"The tokenizer reads {text[:20]!r} as token {beyond[0]}, and the model has "
                f"{size}; use the tokenizer that belongs to the model."
            )
    note(
        f"The tokenizer has {tokenizer.size} tokens and the model {size}: text that needs the "
        "others cannot be read."
    )


def _compare(checkpoint: Checkpoint, draft: Path, tokenizer: Tokenizer, note: Note) -> None:
    source = _live(checkpoint) or load_source(_origin(checkpoint, draft))
    if source is None:
        note(
            "The tokenizer was not compared with transformers', which cannot load it without "
            "running code of its own."
        )
        return
    try:
        difference, beginning = compare(tokenizer, source), beginning_of(source)
    except SourceError as error:
        note(f"The tokenizer was not compared with transformers', which fails with it: {error}")
        return
    if beginning is not None and beginning != tokenizer.beginning:
        note(
            f"transformers begins a text with the tokens {list(beginning)}, and the bundle's "
            f"tokenizer.json with {list(tokenizer.beginning)}, as llm-coreml then does; mend the "
            "post_processor of tokenizer.json if the model was trained with the former."
        )
    if difference is None:
        return
    # A file that was there already is what every runner reads, whatever transformers makes of it.
    if TOKENIZER not in checkpoint.tokenizer_files and difference.reads:
        raise CheckpointError(
            f"The tokenizer cannot be turned into a tokenizer.json without a loss: {difference}. "
            "Give the model a tokenizer.json of its own, or leave the tokenizer out."
        )
    note(f"The bundle's tokenizer and transformers' differ: {difference}.")


def _live(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of transformers that was given with a live model, if one was."""
    from transformers import PreTrainedTokenizerBase

    files = checkpoint.files if isinstance(checkpoint, CheckpointOver) else checkpoint
    given = files.tokenizer if isinstance(files, LiveCheckpoint) else None
    return given if isinstance(given, PreTrainedTokenizerBase) else None


def _all_ends(
    draft: Path, tokenizer: Tokenizer, size: int, eos: tuple[int, ...], note: Note
) -> tuple[int, ...]:
    """Return `eos` and what else ends a text by the tokenizer's files, and tell of that."""
    try:
        ends = end_tokens(draft, tokenizer)
    except LlmCoreMLError as error:
        note(f"Chats will not work: {error}")
        return eos
    more = {text: token for text, token in ends.items() if token not in eos and token < size}
    if not more:
        return eos
    told = " and ".join(f"{text!r} ({token})" for text, token in more.items())
    note(
        f"A text also ends with {told}, which the tokenizer's files name; by the model's own, it "
        f"ends with {list(eos) or 'none'}."
    )
    return (*eos, *more.values())
