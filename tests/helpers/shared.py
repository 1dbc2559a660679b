"""What all workers of a test session share: whoever first needs a thing makes it, once.

    folder = shared.folder("bundle", (model, config), lambda folder: export(model, folder))

A thing is known by what it is made from. It lasts as long as the session, so that no change of the
code is ever held against what an older version made.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from llm_coreml.config import ExportConfig

Source = str | Path | ExportConfig | torch.nn.Module


@dataclass(frozen=True)
class Shared:
    """The folder of a session, for things that tests read and never change."""

    root: Path

    def folder(self, name: str, sources: Sequence[Source], make: Callable[[Path], object]) -> Path:
        """Return the folder of what is made from `sources`, which `make` fills where none has yet.

        Two workers get the same path: what a file may say of its own place holds in both. A folder
        that `make` did not finish is made anew.
        """
        folder = self.root / f"{name}-{fingerprint(sources)[:16]}"
        done = folder.with_suffix(".done")
        with FileLock(folder.with_suffix(".lock")):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                make(folder)
                done.touch()
        return folder

    def file(self, name: str, sources: Sequence[Source], make: Callable[[Path], object]) -> Path:
        """Return the file `name` that is made from `sources`; `make` gets the path to write."""
        plain = name.replace(".", "-")
        return self.folder(plain, sources, lambda folder: make(folder / name)) / name


def fingerprint(sources: Sequence[Source]) -> str:
    """Return the SHA-256 of settings, texts, live models, and of all files in folders."""
    digest = hashlib.sha256()
    for source in sources:
        for part in _parts(source):
            digest.update(hashlib.sha256(part).digest())
        digest.update(type(source).__name__.encode())
    return digest.hexdigest()


def _parts(source: Source) -> list[bytes]:
    if isinstance(source, Path):
        files = sorted(path for path in source.rglob("*") if path.is_file())
        names = [str(path.relative_to(source)).encode() for path in files]
        return [*names, *(path.read_bytes() for path in files)]
    if isinstance(source, torch.nn.Module):
        settings: Any = getattr(source, "config", None)
        parts = [repr(source).encode(), settings.to_json_string().encode() if settings else b""]
        for name, value in source.state_dict().items():
            held = value.detach().contiguous().flatten().view(torch.uint8)
            parts += [f"{name} {value.dtype} {tuple(value.shape)}".encode(), held.numpy().tobytes()]
        return parts
    return [repr(source).encode()]
