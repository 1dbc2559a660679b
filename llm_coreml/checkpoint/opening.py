"""Open a causal LM wherever it is.

One entry for a folder, a hub id and a live `transformers` model, so that the rest of the export
never asks where weights come from.

    llm-coreml export meta-llama/Llama-3.2-1B -o llama
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm_coreml.checkpoint.adapters import with_adapter
from llm_coreml.checkpoint.checkpoint import WEIGHT_DTYPES, Checkpoint, Source
from llm_coreml.checkpoint.files import CONFIG, open_folder
from llm_coreml.checkpoint.gguf import open_gguf
from llm_coreml.checkpoint.gguf_files import is_gguf, only_model
from llm_coreml.checkpoint.hub import HUB_ID, fetch_settings, open_fetched
from llm_coreml.checkpoint.live import open_live
from llm_coreml.checkpoint.lone_adapters import (
    is_lone_adapter,
    open_lone_adapter,
)
from llm_coreml.checkpoint.packed import PackedCheckpoint, find_formats, names_quantization
from llm_coreml.checkpoint.packed.codebook_format import TrainedCodebook, holds_tables
from llm_coreml.errors import CheckpointError, ConfigError

_CONFIG = "config.json"
_Opened = TypeVar("_Opened", bound=Checkpoint)


def open_checkpoint(
    source: str | Path | torch.nn.Module,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
    judge: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Checkpoint:
    """Open a checkpoint; reads configuration and headers, and no tensor data.

    Args:
        source: A folder, one of an adapter alone that names its base too, a `.gguf` file or a
            folder that holds one, a hub id `org/name`, or a live `transformers` model. A string
            that is an existing folder is that folder.
        tokenizer: The tokenizer of a live model; files bring their own.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Take a hub id from the local cache, without network.
        judge: Given the configuration before any weights are fetched; raises to refuse it.

    Raises:
        CheckpointError: Nothing is there, it cannot be fetched, or it is damaged.
        UnsupportedError: The weights are quantized or arranged in an unknown way, or are an adapter
            that is not merged here.
        ConfigError: `tokenizer` or `revision` is given for a source that has none.
    """
    live = isinstance(source, torch.nn.Module)
    if tokenizer is not None and not live:
        raise ConfigError(
            "tokenizer belongs to a live model; a folder or hub id brings its own. Leave it out."
        )
    folder, file = _as_folder(source), _as_gguf(source)
    is_hub = not live and folder is None and file is None
    if revision is not None and not is_hub:
        raise ConfigError(
            f"revision '{revision}' belongs to a hub id; a folder or live model has only one. "
            "Leave it out."
        )
    if isinstance(source, torch.nn.Module):
        return _unpacked(_judged(open_live(source, tokenizer), judge))
    if file is not None:
        return _unpacked(open_gguf(file, Source("folder", str(source)), judge))
    if folder is not None and is_lone_adapter(folder):
        own = Source("folder", str(source))
        return open_lone_adapter(folder, own, local_files_only, judge)
    if folder is not None:
        files = open_folder(folder, Source("folder", str(source)))
        return _unpacked(with_adapter(folder, _judged(files, judge)))
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        fetched = fetch_settings(source, revision, local_files_only)
        if is_lone_adapter(fetched) and not (fetched / CONFIG).is_file():
            own = Source("hub", source, fetched.name)
            return open_lone_adapter(fetched, own, local_files_only, judge)
        return _unpacked(open_fetched(source, fetched, local_files_only, judge))
    raise CheckpointError(
        f"{str(source)!r} is neither an existing folder, a hub id (org/name) nor a live model, nor "
        "an existing .gguf file. "
        "Check the path, or write the id in full."
    )


def _judged(checkpoint: _Opened, judge: Callable[[dict[str, Any]], None]) -> _Opened:
    judge(checkpoint.config)
    return checkpoint


def is_quantized(config: dict[str, Any]) -> bool:
    """Say whether a configuration is that of matrices which are quantized already."""
    return names_quantization(config)


def expanded(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that gives quantized matrices as values only."""
    if isinstance(checkpoint, PackedCheckpoint):
        return dataclasses.replace(checkpoint, as_values=True)
    return checkpoint


def _unpacked(files: Checkpoint) -> Checkpoint:
    """Return files whose matrices are quantized as a checkpoint of matrices."""
    if holds_tables(files.names()):
        return PackedCheckpoint(files, (TrainedCodebook(), *find_formats(files.config, _CONFIG)))
    if not names_quantization(files.config):
        return files
    # Weights are what counts: settings stay behind where a model was merged or dequantized.
    if all(files.dtype(name) in WEIGHT_DTYPES for name in files.names()):
        return PackedCheckpoint(files, ())
    return PackedCheckpoint(files, find_formats(files.config, _CONFIG))


def _as_gguf(source: object) -> Path | None:
    """Return the GGUF file that `source` is, or that is the only weights in a folder, or None."""
    if not isinstance(source, (str, Path)):
        return None
    path = Path(os.path.expanduser(source))
    if is_gguf(path):
        return path
    if not str(source).strip() or not os.path.isdir(path) or any(path.glob("*.safetensors*")):
        return None
    return only_model(path)


def _as_folder(source: object) -> Path | None:
    """Return the existing folder that `source` names, or None."""
    if not isinstance(source, (str, Path)) or not str(source).strip():
        return None
    path = os.path.expanduser(source)
    return Path(path) if os.path.isdir(path) else None
