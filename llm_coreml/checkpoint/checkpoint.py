"""What every checkpoint offers, wherever its tensors live: names, shapes, checked reads, a hash.

The export holds one weight at a time, so a checkpoint is read by name and the whole model never
stands in memory. Each read is checked, because one NaN or one float16 overflow in a weight makes
every logit of the exported program worthless without anything reporting it.

    llm-coreml export meta-llama/Llama-3.2-1B -o llama
"""

from __future__ import annotations

import abc
import dataclasses
import fnmatch
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, final

import torch

from llm_coreml.checkpoint.matrix import Packed, PackedForm
from llm_coreml.errors import CheckpointError, ConfigError

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

# Elements per step of a read: the checks need temporaries, which must not grow with the tensor.
_CHUNK = 1 << 22


@final
@dataclasses.dataclass(frozen=True)
class Source:
    """Where a checkpoint came from, as a manifest records it.

    Attributes:
        kind: `folder`, `hub`, `live`, or `bundled` for the model that ships in the package.
        name: The folder as it was given, the hub id, the live model's own name, or the recipe.
        revision: The resolved commit of a hub id, else None.
    """

    kind: Literal["folder", "hub", "live", "bundled"]
    name: str
    revision: str | None = None


class Checkpoint(abc.ABC):
    """A model's configuration and its tensors, read one at a time by name.

    Attributes:
        config: The parsed config.json; it holds a `model_type`.
        generation_config: The parsed generation_config.json, empty when there is none.
        source: Where this checkpoint came from.
        tokenizer_files: The tokenizer's files on disk by name. Empty for a live model, whose
            tokenizer `save_tokenizer` writes.
        notes: What a user should know of how the tensors are read, a sentence each.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    source: Source
    tokenizer_files: dict[str, Path]
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """Return the names of all tensors, one per storage: tied names are in `tied`."""

    @abc.abstractmethod
    def tied(self) -> dict[str, str]:
        """Return each name that shares its storage with a tensor in `names`, and that tensor."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`, without reading its data. Raises CheckpointError."""

    @abc.abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type of `name`, without reading its data. Raises CheckpointError."""

    @abc.abstractmethod
    def where(self, name: str) -> str:
        """Return the file that holds `name`, as a message names it. Raises CheckpointError."""

    @abc.abstractmethod
    def stored(self, name: str) -> torch.Tensor:
        """Return `name` as it is stored, unchecked and not to be written to; see `tensor`."""

    @abc.abstractmethod
    def save_tokenizer(self, folder: Path) -> dict[str, Path]:
        """Write the tokenizer's files and generation_config.json into `folder`.

        Returns:
            The files written, by name.

        Raises:
            CheckpointError: There is no tokenizer.
            UnsupportedError: A file of it is a link out of its folder.
            OutputError: The files cannot be written.
        """

    def contents(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the stored tensors that make up `name`, each under its own name."""
        yield name, self.stored(name)

    def quantized(self) -> Mapping[str, str]:
        """Return what each quantized matrix is stored as, by name; reads no tensor."""
        return MappingProxyType({})

    def forms(self) -> Mapping[str, PackedForm]:
        """Return how each quantized matrix is stored, by name. Raises CheckpointError."""
        return MappingProxyType({})

    def packed(self, name: str) -> Packed | None:
        """Return a quantized matrix as codes and levels, None for any other tensor."""
        return None

    @final
    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read one tensor, check that it is finite, and cast it.

        Args:
            name: A name in `names` or `tied`.
            dtype: bfloat16, float16 or float32.

        Returns:
            A contiguous CPU tensor of shape `shape(name)` that the caller may write to.

        Raises:
            CheckpointError: The name is unknown, the data cannot be read, the stored type is not
                a weight's, a value is NaN or infinite, or a value does not fit `dtype`.
            ConfigError: `dtype` is not one of the three.
        """
        require_weight_dtype(name, self.dtype(name), self.where(name))
        return cast_checked(self.stored(name), dtype, f"'{name}' in {self.where(name)}")

    @final
    def sha256(self, names: Collection[str] | None = None) -> str:
        """Return a hash over tensors' names, types, shapes and bytes, in order of name.

        Sharding and file metadata do not enter, so the same weights give the same hash as one
        file, as shards, or as a live model. Reads the data once, a piece at a time.

        Args:
            names: The tensors to hash; None takes all of `names()`.
        """
        digest = hashlib.sha256()
        for name in sorted(self.names() if names is None else names):
            for part, stored in self.contents(name):
                digest.update(
                    json.dumps([part, type_name(stored.dtype), list(stored.shape)]).encode() + b"\n"
                )
                for _, piece in _pieces(stored):
                    digest.update(piece.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def cast_checked(stored: torch.Tensor, dtype: torch.dtype, described: str) -> torch.Tensor:
    """Return a copy of `stored` as `dtype`, bfloat16, float16 or float32, on the CPU.

    Args:
        stored: Of any weight's type, on any device.
        dtype: The type wanted.
        described: What a message calls the tensor: `'norm.weight' in model.safetensors`.

    Raises:
        CheckpointError: a value is NaN or infinite, or does not fit `dtype`.
        ConfigError: `dtype` is not one of the three.
    """
    if dtype not in WEIGHT_DTYPES:
        raise ConfigError(
            f"Weights are read as bfloat16, float16 or float32, not {type_name(dtype)}."
        )
    result = torch.empty(stored.shape, dtype=dtype)
    flat = result.view(-1)
    for start, piece in _pieces(stored):
        cast = piece.to(dtype)
        # A stored NaN or infinity survives every cast, so one pass finds both kinds of fault.
        if not _all_finite(cast):
            raise _not_finite(described, start, piece, cast, stored.shape)
        flat[start : start + len(piece)] = cast
    return result


def require_weight_dtype(name: str, dtype: torch.dtype, where: str) -> None:
    """Raise CheckpointError unless `dtype` is one that weights are stored in."""
    if dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"'{name}' in {where} is stored as {type_name(dtype)}; a weight must be bfloat16, "
            "float16 or float32. Save the model again in one of these."
        )


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a type without its module: `float16`."""
    return str(dtype).removeprefix("torch.")


def listing(items: Sequence[str], limit: int = 5) -> str:
    """Return the first `limit` items, and how many more there are."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Say whether a name is like one of the glob patterns, capitals told apart."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def quoted(names: Iterable[str]) -> list[str]:
    """Return each name in quotes."""
    return [f"'{name}'" for name in names]


def _pieces(stored: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(start, piece)` over the flattened tensor; a piece is contiguous and on the CPU."""
    flat = stored.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield start, flat[start : start + _CHUNK].cpu().contiguous()


def _all_finite(piece: torch.Tensor) -> bool:
    """Return whether no value of `piece`, which is not empty, is NaN or infinite."""
    # aminmax hands NaN on and needs a fifth of the time of isfinite, which was most of a read.
    low, high = torch.aminmax(piece)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _not_finite(
    described: str,
    start: int,
    piece: torch.Tensor,
    cast: torch.Tensor,
    shape: torch.Size,
) -> CheckpointError:
    """Return the error for the first value of `cast` that is not finite."""
    offset = int(torch.isfinite(cast).logical_not().nonzero()[0, 0])
    value = float(piece[offset])
    index = [int(i) for i in torch.unravel_index(torch.tensor(start + offset), shape)]
    if not bool(torch.isfinite(piece[offset])):
        return CheckpointError(
            f"{described} is {value} at {index}; weights must be finite. Download the file "
            "again, or go back to a checkpoint from before the training diverged."
        )
    return CheckpointError(
        f"{described} is {value:g} at {index}, beyond the largest {type_name(cast.dtype)}, "
        f"{torch.finfo(cast.dtype).max:g}; use --compute-precision fp32, which reads it as float32."
    )
