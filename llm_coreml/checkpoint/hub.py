"""A checkpoint on the Hugging Face hub: which files to fetch, and what to do when that fails.

The small files come first, so that an unknown checkpoint is refused before gigabytes of weights are
fetched; then exactly the weight files that the index names. A repository's pickles
and second copies of its weights (`consolidated.safetensors`) are never fetched.

    llm-coreml export meta-llama/Llama-3.2-1B --revision main -o llama
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_coreml.checkpoint.checkpoint import TOKENIZER_FILES, Source
from llm_coreml.checkpoint.files import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    QUANTIZERS,
    WEIGHTS,
    FileCheckpoint,
    open_folder,
    read_config,
    read_json,
    read_weight_map,
)
from llm_coreml.checkpoint.packed import find_formats
from llm_coreml.checkpoint.wrappers import text_part
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.printable import printable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)

_SMALL_FILES = (CONFIG, ADAPTER_CONFIG, INDEX, *QUANTIZERS, *TOKENIZER_FILES)


def open_hub(
    repo: str,
    revision: str | None,
    local_files_only: bool,
    judge: Callable[[dict[str, Any]], None],
) -> FileCheckpoint:
    """Fetch `org/name` into the hub's local cache and open it there.

    Args:
        repo: The hub id.
        revision: A branch, tag or commit; None is the default branch.
        local_files_only: Use the cache and no network, as `HF_HUB_OFFLINE=1` does.
        judge: Given the configuration before any weights are fetched; raises to refuse it.

    Raises:
        CheckpointError: It cannot be fetched, or what was fetched is damaged.
        UnsupportedError: The weights are quantized in an unknown way, or the repository holds
            an adapter.
    """
    folder = fetch_settings(repo, revision, local_files_only)
    return open_fetched(repo, folder, local_files_only, judge)


def fetch_settings(repo: str, revision: str | None, local_files_only: bool) -> Path:
    """Fetch all but weights, and return the folder. Raises CheckpointError."""
    return fetch(repo, revision, local_files_only, _SMALL_FILES)


def open_fetched(
    repo: str, folder: Path, local_files_only: bool, judge: Callable[[dict[str, Any]], None]
) -> FileCheckpoint:
    """Fetch the weights of a repository whose settings lie in `folder`; see `open_hub`."""
    if not (folder / CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"'{repo}' has no config.json. Where it holds GGUF files, fetch one, which is enough "
            f"alone, and give its path: hf download {repo} FILE.gguf --local-dir ."
        )
    config = text_part(read_config(folder)).config
    judge(config)
    _refuse_both(repo, folder)
    find_formats(config, CONFIG)  # a format that cannot be read, before gigabytes of it
    # The cache names a snapshot's folder after its commit: both fetches see the same one.
    commit = folder.name
    weight_map = read_weight_map(folder) if (folder / INDEX).is_file() else None
    weights = sorted(set(weight_map.values())) if weight_map else [WEIGHTS]
    folder = fetch(repo, commit, local_files_only, (*_SMALL_FILES, *weights))
    return open_folder(folder, Source("hub", repo, commit))


def _refuse_both(repo: str, folder: Path) -> None:
    """Refuse a repository that holds an adapter and a whole model: one may hold the other already.

    transformers takes neither's part: it puts the adapter on the model that the adapter names.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise UnsupportedError(
            f"'{repo}' holds an adapter for {printable(repr(base), 100)} and a whole model, and "
            f"which is meant cannot be told. Download it: hf download {repo} --local-dir FOLDER. "
            f"Remove {ADAPTER_CONFIG} from FOLDER if its weights hold the adapter already, or "
            "leave it there if they do not, and give FOLDER."
        )


def fetch(repo: str, revision: str | None, local_files_only: bool, files: tuple[str, ...]) -> Path:
    """Return the cached snapshot of `repo` with at least those of `files` that exist there."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=list(files),
            )
        )
    # The hub client leaks what its HTTP and transfer libraries raise: no narrower type holds them.
    except Exception as error:
        raise CheckpointError(_reason(repo, revision, error)) from error


def _reason(repo: str, revision: str | None, error: Exception) -> str:
    """Return what went wrong with a fetch, and what to do next."""
    from huggingface_hub import errors

    at = f"'{repo}'" + (f" at revision '{revision}'" if revision else "")
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    # A gated repository is a kind of "not found" in the client's tree, so it is asked for first.
    if isinstance(error, errors.GatedRepoError):
        return (
            f"'{repo}' is gated. Accept its terms at https://huggingface.co/{repo}, then log in: "
            "hf auth login."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"'{repo}' is neither a folder here nor a model on the hub that you may read. "
            "Check the spelling; for a private one log in: hf auth login."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"'{repo}' has no revision '{revision}'. "
            f"See https://huggingface.co/{repo}/tree/main for its branches, tags and commits."
        )
    if isinstance(error, errors.HFValidationError):
        return f"'{repo}' is not a valid hub id: {detail}. Give org/name, or a folder."
    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return (
            f"{at} is not complete in the local cache, and the hub cannot be reached ({detail}). "
            "Connect, or leave offline mode (HF_HUB_OFFLINE, local_files_only), or give a folder."
        )
    return (
        f"{at} cannot be fetched from the hub ({type(error).__name__}: {detail}). "
        "Try again, or download it yourself and give the folder."
    )
