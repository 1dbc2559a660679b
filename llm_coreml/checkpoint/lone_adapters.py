"""A folder or repository that holds an adapter alone, read with the base model that it names.

    llm-coreml export ./my-lora -o out       # what PEFT's save_pretrained(folder) writes

The base is fetched, or opened where it lies, and the adapter is merged into it as its weights are
read (`adapters`). What tokenizer lies beside the adapter is the model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_coreml.checkpoint.adapters import with_adapter
from llm_coreml.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint, Source
from llm_coreml.checkpoint.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    INDEX,
    WEIGHTS,
    FileCheckpoint,
    find_tokenizer,
    open_folder,
    read_header,
    read_json,
)
from llm_coreml.checkpoint.hub import HUB_ID, fetch, open_hub
from llm_coreml.checkpoint.layouts import HEAD_WEIGHT, TABLE_WEIGHT, ordinary_names
from llm_coreml.errors import CheckpointError
from llm_coreml.lfs import require_fetched
from llm_coreml.printable import printable

Judge = Callable[[dict[str, Any]], None]


def is_lone_adapter(folder: Path) -> bool:
    """Say whether a folder holds an adapter and no weights to merge it into."""
    held = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    return (folder / ADAPTER_CONFIG).is_file() and not held


def open_lone_adapter(
    folder: Path, source: Source, local_files_only: bool, judge: Judge
) -> Checkpoint:
    """Open the base model of an adapter, the adapter merged.

    Of a repository the adapter's weights are fetched first.

    Args:
        folder: Where the adapter lies.
        source: What it is called.
        local_files_only: Take a base on the hub from the local cache, without network.
        judge: Given the base's configuration before its weights are fetched.

    Raises:
        CheckpointError: the base is not told or not there, or the adapter is of another model.
        UnsupportedError: the adapter is not merged here, or the base is quantized.
    """
    if source.kind == "hub":
        files = (ADAPTER_CONFIG, ADAPTER, *TOKENIZER_FILES)
        folder = fetch(source.name, folder.name, local_files_only, files)
    settings = read_json(folder / ADAPTER_CONFIG)
    base, told = _open_base(folder, settings, local_files_only, judge)
    opened = dataclasses.replace(
        base,
        source=source,
        config=_resized(folder, base),
        tokenizer_files={**base.tokenizer_files, **_own_tokenizer(folder)},
        notes=(*base.notes, told),
    )
    return with_adapter(folder, opened)


def _open_base(
    folder: Path, settings: dict[str, Any], local_files_only: bool, judge: Judge
) -> tuple[FileCheckpoint, str]:
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name.strip():
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} names no base model (base_model_name_or_path); write its "
            "hub id or folder there, or put the adapter beside the base's weights."
        )
    shown = printable(name, 100)
    # Relative to where the training ran; its folder may have moved together with the adapter's.
    for place in (Path(name).expanduser(), folder / name):
        if place.is_dir():
            opened = open_folder(place, Source("folder", str(place)))
            judge(opened.config)
            return opened, f"The base of the adapter is read from the folder '{place.name}'."
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} names the base model '{shown}', which is no folder here "
            "and no hub id; write where it is into base_model_name_or_path."
        )
    found = revision if isinstance(revision, str) and revision else None
    opened = open_hub(name, found, local_files_only, judge)
    at = (opened.source.revision or "")[:12]
    return opened, f"The base of the adapter is '{shown}' at {at}."


def _own_tokenizer(folder: Path) -> dict[str, Path]:
    """Return the tokenizer beside an adapter, nothing where it is not whole."""
    found = find_tokenizer(folder)
    found.pop("generation_config.json", None)
    return found if "tokenizer.json" in found or "tokenizer.model" in found else {}


def _resized(folder: Path, base: FileCheckpoint) -> dict[str, Any]:
    """Return the base's configuration, with as many tokens as the adapter's own table has."""
    path = folder / ADAPTER
    if not path.is_file():
        return base.config
    require_fetched(path)
    header = read_header(path)
    layout = ordinary_names(header, among_others=base.among_others)
    for name in (TABLE_WEIGHT, HEAD_WEIGHT):
        stored = layout.names.get(name)
        if stored is not None and len(header[stored].shape) == 2:
            return {**base.config, "vocab_size": header[stored].shape[0]}
    return base.config
