"""A checkpoint in one GGUF file, or in the parts of one.

config.json and the tokenizer beside it are taken where they are, else both are made from the file's
own metadata. Tensors are given the names that `transformers` has for them. Where llama.cpp's
converter puts rows in another order, or adds one to gains, that is undone, by whole rows of blocks.

    llm-coreml export ./model-Q4_0.gguf -o out
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import torch

from llm_coreml.checkpoint.checkpoint import Checkpoint, Source
from llm_coreml.checkpoint.files import (
    CONFIG,
    GENERATION_CONFIG,
    copy_tokenizer,
    find_tokenizer,
    make_tokenizer,
    read_config,
    read_json,
)
from llm_coreml.checkpoint.gguf_architectures import ARCHITECTURES, Architecture, Rows
from llm_coreml.checkpoint.gguf_config import config_of, special_tokens
from llm_coreml.checkpoint.gguf_files import GGUFFile, open_parts
from llm_coreml.checkpoint.gguf_header import TensorInfo
from llm_coreml.checkpoint.gguf_rope import Factors, with_long_factors, with_scaling, with_share
from llm_coreml.checkpoint.gguf_tokenizer import write_tokenizer
from llm_coreml.checkpoint.packed.blocks import BLOCKS
from llm_coreml.checkpoint.wrappers import text_part
from llm_coreml.errors import CheckpointError, UnsupportedError, nearest

_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
# Parts of the configuration.
_FREQUENCIES = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# Any of these is a tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@final
@dataclass(frozen=True, eq=False)
class GGUFCheckpoint(Checkpoint):
    """The tensors of GGUF files; a quantized one is named after its type, as its only part.

    Attributes:
        files: The parts of the model, in order; the first has the metadata.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    source: Source
    tokenizer_files: dict[str, Path]
    files: tuple[GGUFFile, ...] = field(repr=False)

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset((*self._infos, *self._kept))

    def tied(self) -> dict[str, str]:
        """Return an empty dict: each name has its own bytes."""
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`; of a quantized matrix rows and bytes of a row."""
        if name in self._kept:
            return self._kept[name].shape
        _, info = self._info(name)
        if info.kind in _PLAIN:
            return info.shape
        form = BLOCKS[info.kind]
        return (*info.shape[:-1], info.shape[-1] // form.elements * form.size)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type of `name`."""
        if name in self._kept or self._is_shifted(name):
            return torch.float32
        return _PLAIN.get(self._info(name)[1].kind, torch.uint8)

    def where(self, name: str) -> str:
        """Return the name of the file."""
        return self.files[0].path.name if name in self._kept else self._info(name)[0].path.name

    def stored(self, name: str) -> torch.Tensor:
        """Return `name` from the mapped file, rows and gains as `transformers` has them."""
        if name in self._kept:
            return self._kept[name]
        file, info = self._info(name)
        kind = _PLAIN.get(info.kind, torch.uint8)
        found = _read(file, info, kind, self.shape(name))
        if self._is_shifted(name):
            return found.to(torch.float32) - 1
        rows = self._rows(name)
        return found if rows == "own" else self._in_order(name, rows, found)

    def save_tokenizer(self, folder: Path) -> dict[str, Path]:
        """Copy the tokenizer's files into `folder`, or make them from the metadata."""
        if any(name in self.tokenizer_files for name in _TOKENIZERS):
            return copy_tokenizer(self.tokenizer_files, folder, self.source.name)
        write = partial(write_tokenizer, self.files[0].path, self._metadata, folder)
        generation = self.generation_config or special_tokens(self._metadata)
        return make_tokenizer(folder, write, generation)

    @property
    def _metadata(self) -> Mapping[str, Any]:
        return self.files[0].header.metadata

    @cached_property
    def _infos(self) -> dict[str, tuple[GGUFFile, TensorInfo]]:
        found: dict[str, tuple[GGUFFile, TensorInfo]] = {}
        for file in self.files:
            for name, info in file.header.tensors.items():
                if name in (_FREQUENCIES, _SHORT, _LONG):
                    continue
                _check(file, name, info)
                module, _, suffix = self._known.name(name).rpartition(".")
                named = f"{module}.{BLOCKS[info.kind].name if info.kind in BLOCKS else suffix}"
                if named in found:
                    raise CheckpointError(
                        f"Both {found[named][0].path} and {file.path} hold '{name}'. Download the "
                        "parts again, from one model."
                    )
                found[named] = (file, info)
        return found

    @cached_property
    def _kept(self) -> dict[str, torch.Tensor]:
        """Parameters that are numbers of the metadata, one for each layer or one for all."""
        count, found = int(self.config.get("num_hidden_layers", 0)), {}
        for key, name in self._known.kept.items():
            told = self._metadata.get(key)
            values = told.get("values") if isinstance(told, Mapping) else (told,) * count
            if values is None or len(values) != count or not all(map(_is_number, values)):
                raise CheckpointError(
                    f"{self.files[0].path} gives {key} = {told!r}; it must be a number for each "
                    f"of {count} layers. Download the file again."
                )
            for index, value in enumerate(values):
                found[self._known.of_layer(index, name)] = torch.tensor([value])
        return found

    def _info(self, name: str) -> tuple[GGUFFile, TensorInfo]:
        if name not in self._infos:
            raise CheckpointError(
                f"'{self.source.name}' has no tensor '{name}'.{nearest(name, self._infos)}"
            )
        return self._infos[name]

    @cached_property
    def _known(self) -> Architecture:
        tensors = self.files[0].header.tensors
        return ARCHITECTURES[self._metadata["general.architecture"]].of(tensors)

    def _is_shifted(self, name: str) -> bool:
        return self._known.plus_one and name.endswith("norm.weight")

    def _rows(self, name: str) -> Rows:
        """Return how the rows of `name` are stored."""
        rows = self._known.rows
        turned = (".q_proj.", ".k_proj.") if rows == "pairs" else (".query_key_value.",)
        return rows if any(part in name for part in turned) else "own"

    def _in_order(self, name: str, rows: Rows, found: torch.Tensor) -> torch.Tensor:
        """Return rows in the order of `transformers`.

        Args:
            name: Of the tensor.
            rows: How they are stored.
            found: As they are stored, values or blocks.
        """
        queries = self._heads(name, "head_count", "num_attention_heads")
        keys = self._heads(name, "head_count_kv", "num_key_value_heads", queries)
        heads = queries if ".q_proj." in name else keys
        units = {"pairs": 2 * heads, "heads": 3 * queries, "groups": queries + 2 * keys}[rows]
        if len(found) % units or queries % keys:
            raise CheckpointError(
                f"'{name}' in {self._info(name)[0].path} has {len(found)} rows, which {heads} "
                "heads do not divide. Download the file again."
            )
        rest = found.shape[1:]
        if rows == "pairs":
            return found.view(heads, -1, 2, *rest).transpose(1, 2).reshape(found.shape)
        if rows == "heads":
            return found.view(3, queries, -1, *rest).transpose(0, 1).reshape(found.shape)
        each = found.view(units, -1, *rest)
        parts = [
            part.reshape(keys, -1, *each.shape[1:])
            for part in torch.tensor_split(each, (queries, queries + keys))
        ]
        return torch.cat(parts, dim=1).reshape(found.shape)

    def _heads(self, name: str, key: str, setting: str, default: int | None = None) -> int:
        """Return how many heads the rows of `name` are ordered for, as file and config agree."""
        path, key = self.files[0].path, f"{self._metadata['general.architecture']}.attention.{key}"
        heads = self._metadata.get(key, default)
        if not isinstance(heads, int) or heads < 1:
            raise CheckpointError(
                f"{path} gives {key} = {heads!r}; it must be a number of heads. "
                "Download the file again."
            )
        wanted = self.config.get(setting, heads)
        if heads != wanted:
            raise CheckpointError(
                f"{path} orders the rows of '{name}' for {heads} heads, and config.json gives "
                f"{wanted}; put the config.json of this model beside the file."
            )
        return heads


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def open_gguf(
    path: Path, source: Source, judge: Callable[[dict[str, Any]], None] = lambda _: None
) -> GGUFCheckpoint:
    """Read the header of a GGUF file, and config.json beside it; no tensor data.

    Args:
        path: The file, or any of the parts of one.
        source: Where it came from.
        judge: Given the configuration before anything else is looked at; raises to refuse it.

    Raises:
        CheckpointError: the file is damaged, a part is absent, or metadata is missing.
        UnsupportedError: it holds another architecture, or a type that cannot be read.
    """
    folder, files = path.parent, open_parts(path)
    first = files[0]
    shapes = {}
    for file in files:
        for name, info in file.header.tensors.items():
            _check_size(file, name, info)
            shapes[name] = info.shape
    if (folder / CONFIG).is_file():
        config = text_part(read_config(folder)).config
    else:
        config = config_of(first.header.metadata, shapes, first.path)
    config["quantization_config"] = {"quant_method": "gguf"}
    architecture = first.header.metadata.get("general.architecture")
    if architecture in ARCHITECTURES:
        _take_factors(config, files, made=not (folder / CONFIG).is_file())
    judge(config)
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path} holds a model of architecture {architecture!r}; of GGUF files are read "
            f"{', '.join(ARCHITECTURES)}. Give the safetensors that it was made from."
        )
    generation = folder / GENERATION_CONFIG
    return GGUFCheckpoint(
        config=config,
        generation_config=read_json(generation) if generation.is_file() else {},
        source=source,
        tokenizer_files=find_tokenizer(folder),
        files=files,
    )


def _take_factors(config: dict[str, Any], files: tuple[GGUFFile, ...], made: bool) -> None:
    """Add to a configuration what tensors say of RoPE, or compare.

    Args:
        config: Changed in place.
        files: Of the model.
        made: The configuration was made of the file.
    """
    names = (_FREQUENCIES, _SHORT, _LONG)
    found = {name: file for file in files for name in names if name in file.header.tensors}
    if _FREQUENCIES in found:
        path, factors = found[_FREQUENCIES].path, _factors(found[_FREQUENCIES], _FREQUENCIES)
        if files[0].header.metadata["general.architecture"] == "gemma4":
            with_share(config, factors, made, path)
        else:
            with_scaling(config, factors, path)
    if _SHORT in found and _LONG in found:
        short, long = (_factors(found[name], name) for name in (_SHORT, _LONG))
        with_long_factors(config, short, long, made, found[_LONG].path)


def _factors(file: GGUFFile, name: str) -> Factors:
    """Return what RoPE's frequencies are divided by, fp64."""
    info = file.header.tensors[name]
    _check(file, name, info)
    if info.kind not in _PLAIN or len(info.shape) != 1 or 0 in info.shape:
        raise CheckpointError(
            f"'{name}' in {file.path} is no row of numbers. Download the file again."
        )
    return _read(file, info, _PLAIN[info.kind], info.shape).to(torch.float64).numpy()


def _read(
    file: GGUFFile, info: TensorInfo, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    start = file.header.start + info.offset
    octets = file.octets[start : start + math.prod(shape) * dtype.itemsize]
    if start % dtype.itemsize:
        octets = octets.copy()
    return torch.from_numpy(octets).view(dtype).view(shape)


def _check(file: GGUFFile, name: str, info: TensorInfo) -> None:
    """Refuse a type that cannot be read, or whose blocks do not fit."""
    if info.kind not in _PLAIN and info.kind not in BLOCKS:
        known = ", ".join(form.name for form in BLOCKS.values())
        raise UnsupportedError(
            f"'{name}' in {file.path} is stored as type {info.kind} of GGUF; {known}, F32, F16 "
            "and BF16 can be read. Give a file in one of these (llama-quantize --allow-requantize "
            "makes a Q8_0 of most), or the unquantized checkpoint."
        )
    if info.kind in BLOCKS and info.shape[-1] % BLOCKS[info.kind].elements:
        raise CheckpointError(
            f"'{name}' in {file.path} has rows of {info.shape[-1]}, which blocks of "
            f"{BLOCKS[info.kind].elements} do not divide. Download the file again."
        )


def _check_size(file: GGUFFile, name: str, info: TensorInfo) -> None:
    """Refuse bytes that are not there; of a type that is not known, at least one for 8 numbers."""
    count = math.prod(info.shape)
    size = count // 8
    if info.kind in _PLAIN:
        size = count * _PLAIN[info.kind].itemsize
    elif info.kind in BLOCKS:
        size = count // BLOCKS[info.kind].elements * BLOCKS[info.kind].size
    if file.header.start + info.offset + size > len(file.octets):
        raise CheckpointError(
            f"{file.path} ends after {len(file.octets)} bytes, before the end of '{name}'. "
            "Download it again."
        )
