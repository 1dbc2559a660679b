"""Named tensors in a file: .safetensors, or numpy's .npz. Nothing is unpickled.

tensors = read_tensors(Path("x.npz"))
write_tensors(Path("out.safetensors"), tensors, overwrite=False)
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from llm_coreml.errors import ConfigError, OutputError
from llm_coreml.machine import machine_memory
from llm_coreml.output import file_beside, output_error

_KINDS = (".npz", ".safetensors")
# What reading a damaged archive, or one made to harm, raises.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in the file at `path`, by name.

    Raises:
        ConfigError: it cannot be read, holds Python objects, or what torch has no type for.
    """
    check_kind(path)
    if not path.is_file():
        raise ConfigError(f"'{path}' is no file; give a .npz or .safetensors file.")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_npz(path)
    except _DAMAGE as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ConfigError(f"'{path}' cannot be read: {reason.rstrip('.')}.") from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    return loaded


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(path) as archive:
        size = sum(item.file_size for item in archive.infolist())
    if size > machine_memory():
        raise ValueError(f"it unpacks to {size / 2**30:.0f} GiB, more than this machine has")
    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def check_kind(path: Path) -> None:
    """Refuse a file whose name does not end in a known way.

    Raises:
        ConfigError: as said.
    """
    if path.suffix not in _KINDS:
        raise ConfigError(f"'{path}' ends in neither .npz nor .safetensors; give one of these.")


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a file that exists or whose place cannot be written, before any work is done.

    Raises:
        ConfigError: its name does not end in a known way.
        OutputError: as said.
    """
    check_kind(path)
    if path.is_dir() or (path.exists() and not overwrite):
        remedy = "" if path.is_dir() else ", or --overwrite to replace it"
        raise OutputError(f"'{path}' exists already; give another name{remedy}.")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"'{folder}' is no folder that can be written to; give another.")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], *, overwrite: bool) -> None:
    """Write `tensors` beside `path` and rename the file, so that a reader never sees half of it.

    Raises:
        ConfigError: the name does not end in a known way.
        OutputError: the file exists already, or cannot be written.
    """
    check_target(path, overwrite)
    held = {name: value.cpu().contiguous() for name, value in tensors.items()}
    try:
        with file_beside(path) as draft:
            if path.suffix == ".safetensors":
                from safetensors.torch import save

                draft.write_bytes(save(held))
            else:
                _write_npz(draft, held)
    except OSError as error:
        raise output_error(path, error) from None


def _write_npz(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # numpy's own function takes names as keyword arguments, of which `file` is its first.
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in tensors.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value.numpy(), allow_pickle=False)
