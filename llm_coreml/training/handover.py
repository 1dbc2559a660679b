"""The weights of a model in training as a folder of safetensors, for another process to read.

folder = hand_over(model, tokenizer, Path("scratch"), step=20)

What is written is what an export of the model itself reads, tensor by tensor: adapters merged in
fp32, wrappers taken off, codes of a training with rounding as codes. Nothing is pickled, and of the
model one file's worth is copied at a time.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llm_coreml.checkpoint import Checkpoint
from llm_coreml.checkpoint.files import ADAPTER, CONFIG, INDEX, WEIGHTS
from llm_coreml.checkpoint.live import open_live
from llm_coreml.errors import OutputError, UnsupportedError
from llm_coreml.output import output_error
from llm_coreml.printable import printable
from llm_coreml.quiet import quiet

# Bytes of tensors in one file, which are in memory twice while it is written.
_SHARD = 1 << 30
# What is left free beside the weights: the export needs room as well.
_SPARE = 1 << 26


@quiet()
def hand_over(
    model: torch.nn.Module, tokenizer: Any, place: Path, step: int, saved: Path | None = None
) -> Path:
    """Write `model` into a folder in `place`, named after model and step.

    Args:
        model: A live `transformers` model, as `export` takes it; it is not changed.
        tokenizer: Its tokenizer, or None.
        place: A folder.
        step: Step of the training.
        saved: What the trainer saved of this step; taken where the model in memory is refused, as
            one is that is sharded over processes.

    Returns:
        The folder, a checkpoint.

    Raises:
        LlmCoreMLError: the model cannot be read, or the folder not be written.
    """
    try:
        opened = open_live(model, tokenizer)
    except UnsupportedError:
        if saved is None or not any((saved / name).exists() for name in (WEIGHTS, INDEX, ADAPTER)):
            raise
        return _linked(saved, place / f"model-step-{step}")
    name = printable(opened.source.name.rstrip("/").rpartition("/")[2], 60)
    folder = place / f"{name}-step-{step}"
    try:
        folder.mkdir()
        if tokenizer is not None:
            opened.save_tokenizer(folder)
        _write(opened, folder)
    except OSError as error:
        raise output_error(folder, error) from None
    return folder


def _write(opened: Checkpoint, folder: Path) -> None:
    sizes = {name: _bytes(opened, name) for name in sorted(opened.names())}
    needed, free = sum(sizes.values()) + _SPARE, shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"The weights take {needed:,} bytes, and {folder.parent} has {free:,} free: free some, "
            "or give a folder elsewhere."
        )
    (folder / CONFIG).write_text(json.dumps(opened.config), encoding="utf-8")
    shards = list(_shards(sizes))
    names = [f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    for file, held in zip(names, shards, strict=True):
        save_file(
            {name: _own(opened.stored(name)) for name in held}, folder / file, {"format": "pt"}
        )
    if len(shards) > 1:
        places = {name: file for file, held in zip(names, shards, strict=True) for name in held}
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / INDEX).write_text(text, encoding="utf-8")


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Yield names whose tensors fill a file, in order."""
    ends = itertools.accumulate(sizes.values())
    numbered = [(end // _SHARD, name) for end, name in zip(ends, sizes, strict=True)]
    for _, held in itertools.groupby(numbered, key=lambda each: each[0]):
        yield [name for _, name in held]


def _bytes(opened: Checkpoint, name: str) -> int:
    return torch.Size(opened.shape(name)).numel() * opened.dtype(name).itemsize


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU that owns all of its bytes, as a file of them must."""
    plain = tensor.detach().cpu().contiguous()
    whole = plain.untyped_storage().nbytes() == plain.nbytes
    return plain if whole else plain.clone()


def _linked(saved: Path, folder: Path) -> Path:
    """Give a checkpoint's files a second name, which outlives the trainer's rotation."""
    try:
        folder.mkdir()
        for path in saved.iterdir():
            if path.suffix in (".safetensors", ".json", ".model", ".jinja") and path.is_file():
                _link(path, folder / path.name)
    except OSError as error:
        raise output_error(folder, error) from None
    return folder


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, to)
