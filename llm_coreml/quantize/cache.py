"""Quantized weights on disk: an interrupted export goes on from them, and the next one reuses them.

    cache = WeightCache(default_folder(), progress.note)
    weights = cache.load(key)
    if weights is None:
        weights = cache.store(key, make())

An entry is a safetensors file named after its key, which is a hash of all that the weights follow
from. What is loaded or stored is read from the mapped file when it is used, and takes no memory of
its own. A damaged entry is made anew, and a disk that takes no more is told of and done without.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llm_coreml.drafts import remove_dead
from llm_coreml.errors import ConfigError
from llm_coreml.output import check_name, file_beside
from llm_coreml.quantize.formats.serialize import from_parts, to_parts

_VARIABLE = "LLM_COREML_CACHE"
_SUFFIX = ".safetensors"
_ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
# What the weights of an entry are computed by.
_SOURCES = ("checkpoint", "families", "decoder", "quantize")
_PACKAGES = ("llm-coreml", "torch", "torchao")
_NAMES = {torch.int8: "I8", torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER = 1 << 24
_PIECE = 1 << 22
# Seconds between two looks at what is in memory.
_INTERVAL = 0.2
# Of what earlier exports left, the least recently used goes beyond this.
_LARGEST = 50 * 10**9


def default_folder() -> Path:
    """Return `$LLM_COREML_CACHE`, or `llm-coreml` in `$XDG_CACHE_HOME`, which is `~/.cache`.

    Raises:
        ConfigError: nobody knows where that is.
    """
    given, home = os.environ.get(_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        if given:
            return Path(given).expanduser()
        return (Path(home) if home else Path.home() / ".cache") / "llm-coreml"
    except RuntimeError:
        where = f"${_VARIABLE} is '{given}', and that" if given else "Your"
        raise ConfigError(
            f"{where} home folder is not known; give --cache DIR, or --no-cache."
        ) from None


def make_key(facts: Mapping[str, str]) -> str:
    """Return the key of weights that follow from `facts` and from the code as it is now."""
    text = json.dumps({"code": _code(), **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Return a hash of the versions and sources that quantized weights come from."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    root = Path(__file__).parents[1]
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class WeightCache:
    """A folder of quantized weights.

    Args:
        folder: Made when something is stored.
        note: Told of damaged entries, and once of a disk that cannot be written to.
        largest: Bytes that the entries of earlier exports may take.
    """

    def __init__(self, folder: Path, note: Callable[[str], None], largest: int = _LARGEST) -> None:
        check_name(folder)
        self.folder = folder
        self._note = note
        self._writable = True
        self._maps: list[mmap.mmap] = []
        with contextlib.suppress(OSError):
            self._tidy(largest)

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """Return the weights of an entry by name, None if it is absent or damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            weights = self._open(path, check=True)
            os.utime(path)
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            self._note(f"'{path}' in the cache is damaged ({error}); its weights are made anew.")
            return None
        return weights

    def store(self, key: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write an entry and return its weights as the file holds them, or as they are if it fails.

        Args:
            key: See `make_key`.
            weights: By name, of the types that `formats.serialize` knows.
        """
        path = self._path(key)
        if not self._writable:
            return dict(weights)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with file_beside(path) as draft, draft.open("wb") as file:
                _write(file, weights)
            return self._open(path, check=False)
        except OSError as error:
            self._writable = False
            self._note(
                f"The cache in '{self.folder}' cannot be written ({error.strerror or error}): an "
                "interrupted export will begin again. Free some space, or give another --cache."
            )
            return dict(weights)

    @contextlib.contextmanager
    def paged_out(self) -> Iterator[None]:
        """While the context lasts, take what was loaded or stored out of memory after each use.

        The system keeps pages of files in memory as long as there is room, in this process's
        account. What they hold is read again when it is needed, most often from the system's own
        copy.
        """
        ended = threading.Event()

        def drop() -> None:
            with contextlib.suppress(OSError, ValueError):  # a system without it keeps its pages
                while not ended.wait(_INTERVAL):
                    for pages in list(self._maps):
                        pages.madvise(mmap.MADV_DONTNEED)

        thread = threading.Thread(target=drop, name="page-out", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _open(self, path: Path, *, check: bool) -> dict[str, torch.Tensor]:
        pages, weights = _read(path, check=check)
        self._maps.append(pages)
        return weights

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _tidy(self, largest: int) -> None:
        """Remove drafts of exports that were killed, and what has not been used for longest."""
        remove_dead(self.folder)
        # Nobody else's files: the folder may be one that holds others, too.
        paths = (path for path in self.folder.iterdir() if _ENTRY.fullmatch(path.name))
        found = [(path.stat(), path) for path in paths]
        total = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda item: item[0].st_mtime):
            if total <= largest:
                break
            path.unlink()
            total -= stat.st_size


def _write(file: BinaryIO, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file piece by piece; its metadata holds types and a hash of the rest."""
    header: dict[str, Any] = {}
    types: dict[str, Any] = {}
    parts: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        types[name], tensors = to_parts(weight)
        parts |= {f"{name}/{part}": tensor.contiguous() for part, tensor in tensors.items()}
    # Wide numbers first, so that all lie at multiples of their size.
    parts = dict(sorted(parts.items(), key=lambda item: -item[1].itemsize))
    at = 0
    for name, tensor in parts.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    digest = hashlib.sha256(_plain(header, types))
    for tensor in parts.values():
        digest.update(_bytes(tensor))
    header["__metadata__"] = {"types": json.dumps(types), "sha256": digest.hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in parts.values():
        file.write(_bytes(tensor))


def _read(path: Path, *, check: bool) -> tuple[mmap.mmap, dict[str, torch.Tensor]]:
    """Return a map of a file that `_write` wrote, and the weights in it.

    Raises:
        ValueError: with `check`, it is not the file that was written.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER:
            raise ValueError("it is no safetensors file")
        header = json.loads(file.read(size))
        metadata = header.pop("__metadata__")
        types = json.loads(metadata["types"])
        if check:
            digest = hashlib.sha256(_plain(header, types))
            while piece := file.read(_PIECE):
                digest.update(piece)
            if digest.hexdigest() != metadata["sha256"]:
                raise ValueError("its hash is another")
        # Nobody writes to it, but torch has no tensors that cannot be written to.
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {name: _view(pages, entry, 8 + size) for name, entry in header.items()}
    weights = {
        name: from_parts(kind, functools.partial(_part, tensors, name))
        for name, kind in types.items()
    }
    return pages, weights


def _view(pages: mmap.mmap, entry: dict[str, Any], begin: int) -> torch.Tensor:
    start, end = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    count = (end - start) // dtype.itemsize
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=begin + start).view(
        entry["shape"]
    )


def _part(tensors: dict[str, torch.Tensor], weight: str, part: str) -> torch.Tensor:
    return tensors[f"{weight}/{part}"]


def _plain(header: dict[str, Any], types: dict[str, Any]) -> bytes:
    return json.dumps([header, types], sort_keys=True).encode()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
