"""Which files a GGUF model is made of: one, or the parts that llama.cpp's `gguf-split` writes.

open_parts(Path("model-00001-of-00003.gguf"))   # all three
only_model(folder)                              # its only model's first file
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np

from llm_coreml.checkpoint.checkpoint import listing
from llm_coreml.checkpoint.gguf_header import MAGIC, Header, Octets, read_header
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.lfs import require_fetched

SUFFIX = ".gguf"

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_COUNT, _NUMBER = "split.count", "split.no"


@final
@dataclass(frozen=True, eq=False)
class GGUFFile:
    """One file, mapped.

    Attributes:
        path: Where it is.
        header: What it says of itself.
        octets: All of its bytes, uint8.
    """

    path: Path
    header: Header = field(repr=False)
    octets: Octets = field(repr=False)


def is_gguf(path: Path) -> bool:
    """Say whether a path is a GGUF file, by its suffix, or by its first bytes if it has none.

    Ollama keeps such files under their hashes.
    """
    if not os.path.isfile(path):  # of any name, however long
        return False
    if path.suffix:
        return path.suffix.lower() == SUFFIX
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def only_model(folder: Path) -> Path | None:
    """Return the GGUF file in `folder`, of parts the first; None if there is none.

    What llama.cpp keeps beside a model for pictures and sounds (`mmproj`) is no model.

    Raises:
        CheckpointError: there are several models.
    """
    models: dict[str, Path] = {}
    try:
        files = sorted(each for each in folder.iterdir() if is_gguf(each))
    except OSError:
        return None  # told when config.json is looked for
    for path in [each for each in files if not _is_projector(each)] or files:
        part = _PART.fullmatch(path.name)
        models.setdefault(f"{part[1]}-{part[3]}" if part else path.name, path)
    if len(models) > 1:
        names = [f"'{path.name}'" for path in models.values()]
        raise CheckpointError(
            f"{folder} holds {len(models)} GGUF models: {listing(names)}. Give the path of one, "
            f"such as {next(iter(models.values()))}."
        )
    return next(iter(models.values()), None)


def open_parts(path: Path) -> tuple[GGUFFile, ...]:
    """Map the files of the model that `path` is, or is a part of, and read their headers.

    Raises:
        CheckpointError: a part is absent, is one of another model, or is damaged.
        UnsupportedError: it is no language model, but what one needs for pictures.
    """
    files = tuple(_open(each) for each in _part_paths(path))
    about = files[0].header.metadata
    if about.get("general.type") == "mmproj" or about.get("general.architecture") == "clip":
        raise UnsupportedError(
            f"{path} holds the tower and the projector for pictures or sounds of a model (mmproj), "
            "and no language model. Give the GGUF file of the model itself."
        )
    for number, file in enumerate(files):
        metadata = file.header.metadata
        count, index = metadata.get(_COUNT, 1), metadata.get(_NUMBER, 0)
        if count in (0, 1) and len(files) == 1:
            continue
        if len(files) == 1:
            raise CheckpointError(
                f"{file.path} is one of {count} parts of a model, and its name does not say where "
                f"the others are. Give all their own names, as model-00001-of-{count:0>5}.gguf, or "
                "merge them: llama-gguf-split --merge."
            )
        if (count, index) != (len(files), number):
            raise CheckpointError(
                f"{file.path} is by its name part {number + 1} of {len(files)}, but its header "
                f"gives {_NUMBER} = {index!r} and {_COUNT} = {count!r}. Download the parts again, "
                "from one model."
            )
    return files


def _is_projector(path: Path) -> bool:
    return "mmproj" in path.name.lower()


def _part_paths(path: Path) -> list[Path]:
    """Return all files of a model, in order, by the name of any of them."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    name, count = part[1], int(part[3])
    present = {each.name for each in path.parent.iterdir()}
    names = [f"{name}-{n:05d}-of-{part[3]}{path.suffix}" for n in range(1, count + 1)]
    absent = [f"'{each}'" for each in names if each not in present]
    if absent or path.name not in names:
        raise CheckpointError(
            f"{path} is one of {count} parts of a model, and {path.parent} lacks "
            f"{listing(absent)}. Download the missing parts into the same folder."
        )
    return [path.parent / each for each in names]


def _open(path: Path) -> GGUFFile:
    require_fetched(path)
    try:
        # Copied where written to, which nobody does: torch warns of memory that it may not write.
        octets = np.memmap(path, np.uint8, mode="c")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Download it again.") from error
    return GGUFFile(path, read_header(path, octets), octets)
