"""A checkpoint in a folder: config.json and safetensors, in one file or in shards with an index.

Nothing in the folder is trusted: headers are checked when the folder is opened, no path in the
index may leave the folder, and a pickle is never loaded. Tensor data is read from the memory-mapped
file, by name, when it is asked for.

    llm-coreml export ./my-finetune -o out
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open

from llm_coreml.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint, Source, listing, quoted
from llm_coreml.checkpoint.conversions import SAVE, conversion_of, folder_conversion
from llm_coreml.checkpoint.layouts import ordinary_names
from llm_coreml.checkpoint.links import refuse_foreign_link
from llm_coreml.checkpoint.packed import names_quantization
from llm_coreml.checkpoint.wrappers import is_tied, text_part
from llm_coreml.errors import (
    CheckpointError,
    LlmCoreMLError,
    OutputError,
    UnsupportedError,
    nearest,
)
from llm_coreml.lfs import require_fetched
from llm_coreml.printable import printable

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Where a tool wrote its settings before transformers knew it, and the tool.
QUANTIZERS = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
ADAPTER = "adapter_model.safetensors"

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}


@final
@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors header: its file, its name there, stored type and shape."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Return the tensor from the mapped file, not to be written to. Raises CheckpointError."""
        # Opened anew for each read: a mapping that is kept would keep its pages, shard after shard.
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(self.name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"'{self.name}' cannot be read from {self.path}: {error}. Download the file again."
            ) from error
        return tensor


@final
@dataclasses.dataclass(frozen=True, eq=False)
class FileCheckpoint(Checkpoint):
    """A checkpoint whose tensors are in safetensors files; see `Checkpoint`.

    Attributes:
        among_others: It is the text model of a model of several modalities.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    source: Source
    tokenizer_files: dict[str, Path]
    entries: dict[str, Entry] = dataclasses.field(repr=False)
    notes: tuple[str, ...] = ()
    among_others: bool = False

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self.entries)

    def tied(self) -> dict[str, str]:
        """Return an empty dict: in files each name has its own bytes."""
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`, from the file's header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type of `name`, from the file's header."""
        return self._entry(name).dtype

    def where(self, name: str) -> str:
        """Return the name of the file that holds `name`."""
        return self._entry(name).path.name

    def stored(self, name: str) -> torch.Tensor:
        """Return `name` from the memory-mapped file; a write to it would reach later reads."""
        return self._entry(name).read()

    def save_tokenizer(self, folder: Path) -> dict[str, Path]:
        """Copy the tokenizer's files and generation_config.json into `folder`."""
        return copy_tokenizer(self.tokenizer_files, folder, self.source.name)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise CheckpointError(
                f"'{self.source.name}' has no tensor '{name}'.{nearest(name, self.entries)}"
            )
        return self.entries[name]


def find_tokenizer(folder: Path) -> dict[str, Path]:
    """Return the tokenizer's files in `folder` by name. Raises CheckpointError for a pointer."""
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    for path in found.values():
        require_fetched(path)
    return found


def copy_tokenizer(files: Mapping[str, Path], folder: Path, source: str) -> dict[str, Path]:
    """Copy the tokenizer's `files` into `folder`; see `Checkpoint.save_tokenizer`."""
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & files.keys():
        raise CheckpointError(
            f"'{source}' has no tokenizer.json. "
            "Save the tokenizer beside the weights: tokenizer.save_pretrained(folder)."
        )
    written = {name: folder / name for name in files}
    with _writing_tokenizer(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            refuse_foreign_link(path)
            shutil.copyfile(path, written[name])
    return written


def make_tokenizer(
    folder: Path, make: Callable[[], None], generation_config: Mapping[str, Any] | None
) -> dict[str, Path]:
    """Have `make` write a tokenizer's files into `folder`; see `Checkpoint.save_tokenizer`.

    Args:
        folder: Where to write.
        make: Makes the folder, if it is not there, and writes the files.
        generation_config: Written beside them; None is not.
    """
    with _writing_tokenizer(folder):
        make()
        if generation_config is not None:
            text = json.dumps(generation_config, indent=2, sort_keys=True) + "\n"
            (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


@contextlib.contextmanager
def _writing_tokenizer(folder: Path) -> Iterator[None]:
    """Say what to do if `folder` cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"The tokenizer cannot be written to {folder}: {error}. "
            "Give a folder that can be written."
        ) from error


def open_folder(folder: Path, source: Source) -> FileCheckpoint:
    """Read the configuration and all safetensors headers of `folder`, and no tensor data.

    Raises:
        CheckpointError: A file is absent, damaged, or disagrees with the index.
        UnsupportedError: The weights are quantized in an unknown way, or the folder holds only an
            adapter.
    """
    part = text_part(read_config(folder))
    generation = folder / GENERATION_CONFIG
    weight_map = read_weight_map(folder)
    files = [WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    headers = {file: read_header(folder / file) for file in files}
    if weight_map is None:
        entries = headers[WEIGHTS]
    else:
        absent = [
            f"'{name}' ({file})" for name, file in weight_map.items() if name not in headers[file]
        ]
        if absent:
            raise CheckpointError(
                f"{folder / INDEX} names tensors that their file does not hold: {listing(absent)}. "
                "Download the index and the shards again, from one revision."
            )
        entries = {name: headers[file][name] for name, file in weight_map.items()}
    among_others = part.whole is not None
    layout = ordinary_names(entries, partial(is_tied, part.config), among_others)
    beside = part.left_out({name: entries[name].size for name in layout.beside})
    return FileCheckpoint(
        config=part.config,
        generation_config=read_json(generation) if generation.is_file() else {},
        source=source,
        tokenizer_files=find_tokenizer(folder),
        entries={name: entries[stored] for name, stored in layout.names.items()},
        notes=(*([beside] if beside else []), *layout.notes),
        among_others=among_others,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of `folder`, with a quantizer's own settings if it has none.

    Raises:
        CheckpointError: The file is absent, not a JSON object, or has no `model_type`.
        UnsupportedError: The weights are quantized in an unknown way, or the folder holds only an
            adapter.
    """
    path = folder / CONFIG
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise CheckpointError(f"{folder} cannot be read: Permission denied. Make it readable.")
    if not path.is_file():
        _refuse_adapter(folder)
        raise CheckpointError(
            f"{folder} has no config.json; a checkpoint is a folder with config.json and "
            "safetensors, as model.save_pretrained(folder) writes it."
        )
    config = read_json(path)
    check_config(config, str(path))
    for name, method in QUANTIZERS.items():
        if (folder / name).is_file() and not names_quantization(config):
            config["quantization_config"] = {"quant_method": method, **read_json(folder / name)}
    return config


def check_config(config: dict[str, Any], where: str) -> None:
    """Raise CheckpointError unless `config` names its `model_type`."""
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{where} has no model_type, so its family is unknown. "
            "Use the config.json that model.save_pretrained(folder) writes."
        )


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """Return which file holds each tensor, or None where model.safetensors holds them all.

    Raises:
        CheckpointError: There are no safetensors, or the index is damaged or leaves the folder.
        UnsupportedError: The folder holds only an adapter.
    """
    if (folder / WEIGHTS).is_file():
        return None
    path = folder / INDEX
    if not path.is_file():
        _refuse_adapter(folder)
        raise _no_weights(folder)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has no weight_map from tensor names to files. Download it again."
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} puts '{name}' into {file!r}; only .safetensors files are read. "
                "Download the index again."
            )
        if "/" in file or "\\" in file or ":" in file:
            raise CheckpointError(
                f"{path} puts '{name}' into {file!r}, which is not a plain file name; nothing "
                "outside its folder is read. Do not use this checkpoint, or mend its index."
            )
    return weight_map


def _no_weights(folder: Path) -> LlmCoreMLError:
    """Return the error for a folder that has neither weights nor an index."""
    files = sorted(path.name for path in folder.glob("*.safetensors") if path.name != ADAPTER)
    for name in files:
        answer = conversion_of(read_header(folder / name))
        if answer:
            return UnsupportedError(f"{folder / name} holds tensors {answer}")
    if files:
        return CheckpointError(
            f"{folder} holds {listing(quoted(files))} but no {WEIGHTS} and no "
            f"{INDEX}. Download {INDEX} as well, or rename a single file to {WEIGHTS}."
        )
    answer = folder_conversion(folder)
    return CheckpointError(
        answer
        or f"{folder} has no {WEIGHTS} and no {INDEX}. If the model is published only as "
        "pytorch_model.bin, a pickle, which is never loaded, convert it once where you trust it: "
        f"{SAVE} writes safetensors."
    )


def _refuse_adapter(folder: Path) -> None:
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        told = f" {printable(repr(base), 100)}" if base else ""
        raise UnsupportedError(
            f"{folder} holds an adapter without its base model{told}. Merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)."
        )


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors that the header of one safetensors file lists."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} is absent, although {INDEX} puts tensors into it. Download it again."
        )
    require_fetched(path)
    entries = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, safe_open is no mapping
                part = file.get_slice(name)
                stored = str(part.get_dtype())
                if stored not in _DTYPES:
                    raise UnsupportedError(
                        f"'{name}' in {path} is stored as {stored}, a type of quantized weights. "
                        "Give the unquantized checkpoint that it was made from."
                    )
                entries[name] = Entry(path, name, _DTYPES[stored], tuple(part.get_shape()))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}. Download it again."
        ) from error
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`."""
    require_fetched(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    # A deep nest of brackets ends in RecursionError; bad UTF-8 and bad JSON are both ValueErrors.
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON: {error}. Download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, not {type(value).__name__}. Download it again."
        )
    return value
