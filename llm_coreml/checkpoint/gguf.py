"""A checkpoint in one GGUF file, with config.json and the tokenizer beside it.

Tensors are given the names that `transformers` has for them. llama.cpp rotates pairs of neighbours
where `transformers` rotates halves, and reorders the rows of q and k for that; this is undone, by
whole rows of blocks.

    llm-coreml export ./llama/model-Q4_0.gguf -o out
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from llm_coreml.checkpoint.checkpoint import Checkpoint, Source
from llm_coreml.checkpoint.files import (
    GENERATION_CONFIG,
    copy_tokenizer,
    find_tokenizer,
    read_config,
    read_json,
)
from llm_coreml.checkpoint.gguf_header import Header, Octets, TensorInfo, read_header
from llm_coreml.checkpoint.packed.blocks import BLOCKS
from llm_coreml.errors import CheckpointError, UnsupportedError, nearest

SUFFIX = ".gguf"

_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Made from config.json here.
_IGNORED = ("rope_freqs.weight",)


@final
@dataclass(frozen=True, eq=False)
class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file; a quantized one is named after its type, as its only part.

    Attributes:
        path: The file.
        header: What it says of itself.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    source: Source
    tokenizer_files: dict[str, Path]
    path: Path
    header: Header = field(repr=False)
    octets: Octets = field(repr=False)

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._infos)

    def tied(self) -> dict[str, str]:
        """Return an empty dict: each name has its own bytes."""
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`; of a quantized matrix rows and bytes of a row."""
        info = self._info(name)
        if info.kind in _PLAIN:
            return info.shape
        form = BLOCKS[info.kind]
        return (*info.shape[:-1], info.shape[-1] // form.elements * form.size)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type of `name`."""
        return _PLAIN.get(self._info(name).kind, torch.uint8)

    def where(self, name: str) -> str:
        """Return the name of the file."""
        self._info(name)
        return self.path.name

    def stored(self, name: str) -> torch.Tensor:
        """Return `name` from the mapped file, rows of q and k in the order of `transformers`."""
        info, dtype, shape = self._info(name), self.dtype(name), self.shape(name)
        start = self.header.start + info.offset
        octets = self.octets[start : start + math.prod(shape) * dtype.itemsize]
        if start % dtype.itemsize:
            octets = octets.copy()
        found = torch.from_numpy(octets).view(dtype).view(shape)
        heads = self._heads(name)
        if heads is None:
            return found
        if shape[0] % (2 * heads):
            raise CheckpointError(
                f"'{name}' in {self.path} has {shape[0]} rows, which {heads} heads do not divide. "
                "Download the file again."
            )
        return found.view(heads, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)

    def save_tokenizer(self, folder: Path) -> dict[str, Path]:
        """Copy the tokenizer's files into `folder`."""
        return copy_tokenizer(self.tokenizer_files, folder, self.source.name)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        found = {}
        for name, info in self.header.tensors.items():
            if name not in _IGNORED:
                self._check(name, info)
                module, _, suffix = _translate(name).rpartition(".")
                found[f"{module}.{BLOCKS[info.kind].name if info.kind in BLOCKS else suffix}"] = (
                    info
                )
        return found

    def _info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise CheckpointError(
                f"'{self.source.name}' has no tensor '{name}'.{nearest(name, self._infos)}"
            )
        return self._infos[name]

    def _check(self, name: str, info: TensorInfo) -> None:
        """Refuse a type that cannot be read, and bytes that are not there."""
        if info.kind not in _PLAIN and info.kind not in BLOCKS:
            known = ", ".join(form.name for form in BLOCKS.values())
            raise UnsupportedError(
                f"'{name}' in {self.path} is stored as type {info.kind} of GGUF; {known}, F32, F16 "
                "and BF16 can be read. Give a file in one of these, or the unquantized checkpoint."
            )
        count, size = math.prod(info.shape), 0
        if info.kind in _PLAIN:
            size = count * _PLAIN[info.kind].itemsize
        else:
            form = BLOCKS[info.kind]
            if info.shape[-1] % form.elements:
                raise CheckpointError(
                    f"'{name}' in {self.path} has rows of {info.shape[-1]}, which blocks of "
                    f"{form.elements} do not divide. Download the file again."
                )
            size = count // form.elements * form.size
        if self.header.start + info.offset + size > len(self.octets):
            raise CheckpointError(
                f"{self.path} ends after {len(self.octets)} bytes, before the end of '{name}'. "
                "Download it again."
            )

    def _heads(self, name: str) -> int | None:
        """Return how many heads the rows of `name` are to be put in order for, None for most."""
        metadata, key = self.header.metadata, "llama.attention.head_count"
        wanted = self.config.get("num_attention_heads")
        if ".q_proj." in name:
            heads = metadata.get(key)
        elif ".k_proj." in name:
            heads = metadata.get(f"{key}_kv", metadata.get(key))
            wanted = self.config.get("num_key_value_heads", wanted)
        else:
            return None
        if not isinstance(heads, int) or heads < 1:
            raise CheckpointError(
                f"{self.path} gives {key} = {heads!r}; it must be a number of heads. Download the "
                "file again."
            )
        if heads != wanted:
            raise CheckpointError(
                f"{self.path} orders the rows of '{name}' for {heads} heads, and config.json gives "
                f"{wanted}; put the config.json of this model beside the file."
            )
        return heads


def open_gguf(path: Path, source: Source) -> GGUFCheckpoint:
    """Read the header of a GGUF file, and config.json beside it; no tensor data.

    Raises:
        CheckpointError: config.json is absent, or the file is damaged.
        UnsupportedError: it holds another architecture, or a type that cannot be read.
    """
    folder = path.parent
    try:
        # Copied where written to, which nobody does: torch warns of memory that it may not write.
        octets = np.memmap(path, np.uint8, mode="c")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Download it again.") from error
    header = read_header(path, octets)
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(
            f"{path} holds a model of architecture {architecture!r}; of GGUF files only 'llama' is "
            "read. Give the safetensors that it was made from."
        )
    generation = folder / GENERATION_CONFIG
    return GGUFCheckpoint(
        config={**read_config(folder), "quantization_config": {"quant_method": "gguf"}},
        generation_config=read_json(generation) if generation.is_file() else {},
        source=source,
        tokenizer_files=find_tokenizer(folder),
        path=path,
        header=header,
        octets=octets,
    )


def _translate(name: str) -> str:
    """Return the name that `transformers` has for a tensor; one that is not known keeps its own."""
    module, _, suffix = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{suffix}"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if found and found[2] in _PARTS:
        return f"model.layers.{found[1]}.{_PARTS[found[2]]}.{suffix}"
    return name
