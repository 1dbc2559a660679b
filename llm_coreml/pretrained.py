"""Exports under the names that fine-tuning libraries give them.

    save_pretrained_coreml(model, "out", tokenizer, bits=4, target="ane")
    push_to_hub_coreml(model, "me/my-model-coreml", tokenizer, bits=4, target="ane")

What is published says nothing of where a model lay: a folder's name is not in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from llm_coreml.bundle.card import model_card
from llm_coreml.bundle.folder import CARD, MANIFEST, Bundle
from llm_coreml.bundle.manifest import File
from llm_coreml.bundle.seal import checksum
from llm_coreml.config import ExportConfig
from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.pipeline import export
from llm_coreml.progress import Progress
from llm_coreml.progress_bar import Step
from llm_coreml.quiet import is_loud, quiet
from llm_coreml.tokenizer.chat_template import find_template

# Of a commit, if nothing else is said.
MESSAGE = "Upload a Core ML export by llm-coreml"
# The client, and the libraries below it.
_OF_THE_HUB = ("huggingface_hub", "httpx", "httpcore", "hf_xet")
# What is meant where nothing else is said.
_USUAL = ExportConfig(bits=4, target="ane")


def save_pretrained_coreml(
    model: str | Path | torch.nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    bits: float | None = None,
    target: str | None = None,
    config: ExportConfig | None = None,
    overwrite: bool = False,
    cache: str | Path | bool = True,
    progress: Progress | bool | Callable[[Step], object] | None = None,
) -> Bundle:
    """Export `model` into `folder`, by itself at 4 bits for the Neural Engine.

    Arguments, result and errors are those of `export`; a `config` says all that `bits` and `target`
    do not.
    """
    return export(
        model,
        tokenizer,
        output=folder,
        bits=bits,
        target=target,
        config=config or _USUAL,
        overwrite=overwrite,
        cache=cache,
        progress=progress,
    )


@quiet()
def push_to_hub_coreml(
    model: str | Path | torch.nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    *,
    bits: float | None = None,
    target: str | None = None,
    config: ExportConfig | None = None,
    cache: str | Path | bool = True,
    progress: Progress | bool | Callable[[Step], object] | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = MESSAGE,
    create_pr: bool = False,
) -> str:
    """Export `model`, and upload the verified bundle to a repository of the Hugging Face hub.

    Args:
        model: What to export, as all down to `progress` as for `save_pretrained_coreml`.
        repo_id: `name` or `owner/name`; it is made if it is not there.
        tokenizer: Tokenizer of a live model.
        bits: Bits per weight.
        target: Compute unit.
        config: All other settings.
        cache: Folder that keeps quantized weights.
        progress: Told of stages.
        token: Token of the hub; None takes the one that is logged in.
        private: Make the repository private, if it is made.
        revision: Branch to commit to; it must be there.
        commit_message: What the commit says.
        create_pr: Open a pull request instead.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        LlmCoreMLError: as `export` does; OutputError where the hub refuses, before any work where
            the repository cannot be made.
    """
    given: dict[str, Any] = {"bits": bits, "target": target, "config": config}
    with writing(repo_id) as done, tempfile.TemporaryDirectory(prefix="llm-coreml-") as place:
        repository = open_repository(repo_id, token, private, done)
        bundle = save_pretrained_coreml(
            model, Path(place, "bundle"), tokenizer, **given, cache=cache, progress=progress
        )
        files = published_files(bundle, repository.name.rpartition("/")[2])
        return repository.commit(files, revision, commit_message, create_pr)


@dataclass
class Done:
    """What of an upload is done already, should the rest fail.

    Attributes:
        made: The repository was made for it.
    """

    made: bool = False


@dataclass(frozen=True)
class Repository:
    """A repository that is there.

    Attributes:
        api: The client.
        name: `owner/name`.
    """

    api: HfApi
    name: str

    def commit(
        self,
        files: Mapping[str, Path | bytes],
        revision: str | None,
        message: str,
        create_pr: bool,
    ) -> str:
        """Add files in one commit, and return its address or that of the pull request.

        Args:
            files: Path or content of each, by its path in the repository.
            revision: Branch; None for the main one.
            message: What the commit says.
            create_pr: Open a pull request instead.
        """
        added = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        done = self.api.create_commit(
            self.name,
            added,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
        )
        return str(done.pr_url or done.commit_url)


def open_repository(
    repo_id: str, token: str | bool | None, private: bool | None, done: Done
) -> Repository:
    """Return a repository of the hub, which is made if it is not there.

    Args:
        repo_id: `name` or `owner/name`.
        token: Token of the hub; None takes the one that is logged in.
        private: Make it private, if it is made.
        done: Told whether it was.
    """
    api = HfApi(token=token)
    there = "/" in repo_id and api.repo_exists(repo_id)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    done.made = not there and "/" in repo_id
    return Repository(api, name)


@contextlib.contextmanager
def writing(repo_id: str) -> Iterator[Done]:
    """Say in a sentence why a repository cannot be written, and what is done of it.

    Raises:
        ConfigError: its name is none.
        OutputError: as said.
    """
    done = Done()
    try:
        with _no_bars():
            yield done
    except HFValidationError as error:
        raise ConfigError(f"'{repo_id}' is no repository id: {error}") from None
    # The hub client leaks what its HTTP and transfer libraries raise: no narrower type holds them.
    except Exception as error:
        # Failures of an upload come wrapped in a RuntimeError.
        if type(error) is RuntimeError and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if type(error).__module__.partition(".")[0].rstrip("2") not in _OF_THE_HUB:
            raise
        told = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        left = " The repository was made, and is empty." if done.made else ""
        raise OutputError(
            f"'{repo_id}' cannot be written ({type(error).__name__}: {told}). Nothing was "
            f"committed.{left} {_advice(error)}"
        ) from error


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the client from drawing bars, unless its user has asked for them."""
    if is_loud() or constants.HF_HUB_DISABLE_PROGRESS_BARS is False or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _advice(error: Exception) -> str:
    """Return what to do about a failure of the hub."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status is None:
        return "Look at the network, and at HF_ENDPOINT and HF_HUB_OFFLINE, and try again."
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.TOO_MANY_REQUESTS:
        return "The hub has trouble of its own; try again later."
    return "Log in with a token that may write (hf auth login), and check name and revision."


def published_files(bundle: Bundle, name: str) -> dict[str, Path | bytes]:
    """Return the files of a bundle as they are published, by their paths.

    Where its source is no repository itself, the bundle calls it by the repository's name.

    Args:
        bundle: The bundle, which is left as it is.
        name: The repository's name, without its owner.
    """
    inside = (path for path in sorted(bundle.folder.rglob("*")) if path.is_file())
    files: dict[str, Path | bytes] = {
        path.relative_to(bundle.folder).as_posix(): path for path in inside
    }
    manifest = bundle.manifest
    if manifest.source.kind in ("hub", "bundled"):
        return files
    rebuild = tuple(f"./{name}" if at == 2 else word for at, word in enumerate(manifest.rebuild))
    renamed = replace(manifest, source=replace(manifest.source, name=name), rebuild=rebuild)
    card = model_card(renamed, chat=find_template(bundle.folder) is not None).encode()
    beside = {**(manifest.files or {}), CARD: File(len(card), hashlib.sha256(card).hexdigest())}
    renamed = replace(renamed, files=beside)
    renamed = replace(renamed, checksum=checksum(renamed.to_json()))
    files[CARD] = card
    files[MANIFEST] = (json.dumps(renamed.to_json(), indent=2, sort_keys=True) + "\n").encode()
    return files
