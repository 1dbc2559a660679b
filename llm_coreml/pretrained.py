"""Exports under the names that fine-tuning libraries give them.

    save_pretrained_coreml(model, "out", tokenizer, bits=4, target="ane")
    push_to_hub_coreml(model, "me/my-model-coreml", tokenizer, bits=4, target="ane")

What is published says nothing of where a model lay: a folder's name is not in it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from llm_coreml.bundle.card import model_card
from llm_coreml.bundle.folder import CARD, MANIFEST, Bundle, open_bundle
from llm_coreml.bundle.seal import sealed
from llm_coreml.config import ExportConfig
from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.output import write_json
from llm_coreml.pipeline import export
from llm_coreml.progress import Progress
from llm_coreml.progress_bar import Step
from llm_coreml.quiet import quiet
from llm_coreml.tokenizer.chat_template import find_template

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
    commit_message: str = "Upload a Core ML export by llm-coreml",
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
    with _writing(repo_id), tempfile.TemporaryDirectory(prefix="llm-coreml-") as place:
        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        bundle = save_pretrained_coreml(
            model, Path(place, "bundle"), tokenizer, **given, cache=cache, progress=progress
        )
        done = api.upload_folder(
            repo_id=name,
            folder_path=_published(bundle, name.rpartition("/")[2]).folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(done.pr_url or done.commit_url)


@contextlib.contextmanager
def _writing(repo_id: str) -> Iterator[None]:
    """Say in a sentence why a repository cannot be written."""
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"'{repo_id}' is no repository id: {error}") from None
    # The hub client leaks what its HTTP and transfer libraries raise: no narrower type holds them.
    except Exception as error:
        if type(error).__module__.partition(".")[0].rstrip("2") not in _OF_THE_HUB:
            raise
        told = (str(error).strip().splitlines() or [""])[0]
        raise OutputError(
            f"'{repo_id}' cannot be written ({type(error).__name__}: {told}). "
            "Log in with a token that may write (hf auth login), and check the name."
        ) from error


def _published(bundle: Bundle, name: str) -> Bundle:
    """Call the source of a bundle by the repository's name, unless it is a repository itself."""
    manifest = bundle.manifest
    if manifest.source.kind in ("hub", "bundled"):
        return bundle
    rebuild = tuple(f"./{name}" if at == 2 else word for at, word in enumerate(manifest.rebuild))
    renamed = replace(manifest, source=replace(manifest.source, name=name), rebuild=rebuild)
    card = model_card(renamed, chat=find_template(bundle.folder) is not None)
    (bundle.folder / CARD).write_text(card, encoding="utf-8")
    (bundle.folder / MANIFEST).unlink()
    write_json(bundle.folder / MANIFEST, sealed(renamed, bundle.folder).to_json())
    return open_bundle(bundle.folder)
