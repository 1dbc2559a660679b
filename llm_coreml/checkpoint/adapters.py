"""LoRA adapters beside full weights, or inside of them, merged as the weights are read.

    checkpoint = with_adapter(folder, files)

`transformers` loads a folder of weights with an `adapter_config.json` as model plus adapter. Read
here are the weights of one model that computes the same, in fp32:

    weight + scale * up @ down                                  LoRA (arXiv:2106.09685)
    magnitude * (weight + scale * up @ down) / its rows' norms  DoRA (arXiv:2402.09353)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import torch

from llm_coreml.checkpoint.adapter_settings import MERGE, LoraSettings, read_settings
from llm_coreml.checkpoint.checkpoint import (
    Checkpoint,
    listing,
    quoted,
    require_weight_dtype,
)
from llm_coreml.checkpoint.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    Entry,
    FileCheckpoint,
    read_header,
    read_json,
)
from llm_coreml.checkpoint.layouts import HEAD_WEIGHT, TABLE_WEIGHT, ordinary_names
from llm_coreml.checkpoint.over_files import CheckpointOver
from llm_coreml.checkpoint.packed import find_formats
from llm_coreml.checkpoint.wrappers import is_tied
from llm_coreml.errors import CheckpointError, UnsupportedError

_KINDS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
# A module, a matrix of its adapter, and the adapter's own name, which files mostly leave out.
_PART = re.compile(rf"(.+)\.({_KINDS})(?:\.(?!weight$)([^.]+))?(?:\.weight)?")
_WHOLE = re.compile(r"(.+)\.modules_to_save\.[^.]+\.(weight|bias)")
_BASE = re.compile(r"(.+)\.(?:base_layer|original_module)\.(weight|bias)")


@final
@dataclass(frozen=True)
class Product:
    """What is added to a weight.

    Attributes:
        down: The matrix that reads the inputs, `[rank, inputs]`.
        up: The matrix that writes the outputs, `[outputs, rank]`.
        scale: The factor of their product.
        table: The weight is a token table, the transpose of a matrix.
        magnitude: The norms `[outputs]` that the rows of the sum get, None where they stay.
    """

    down: Entry
    up: Entry
    scale: float
    table: bool
    magnitude: Entry | None


@final
@dataclass(frozen=True, eq=False)
class MergedCheckpoint(CheckpointOver):
    """Weights with an adapter merged into them; see `Checkpoint`.

    Attributes:
        files: The weights without what the adapter adds.
        products: What is added, by the name of the weight.
        notes: See `Checkpoint`.
    """

    files: FileCheckpoint = field(repr=False)
    products: dict[str, Product] = field(repr=False)
    notes: tuple[str, ...] = ()

    def names(self) -> frozenset[str]:
        """Return the names of the weights."""
        return self.files.names()

    def tied(self) -> dict[str, str]:
        """Return what the files tie."""
        return self.files.tied()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`, from headers."""
        return self.files.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of `name`: a merged weight is computed in fp32."""
        return torch.float32 if name in self.products else self.files.dtype(name)

    def where(self, name: str) -> str:
        """Return the file that holds the weight without its adapter."""
        return self.files.where(name)

    def stored(self, name: str) -> torch.Tensor:
        """Return `name`, its adapter merged."""
        weight, product = self.files.stored(name), self.products.get(name)
        if product is None:
            return weight
        down, up = product.down.read().float(), product.up.read().float()
        added = (up @ down) * product.scale
        merged = weight.float() + (added.T if product.table else added)
        if product.magnitude is None:
            return merged
        norms: torch.Tensor = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
        return merged * (product.magnitude.read().float().unsqueeze(1) / norms)

    def contents(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the stored tensors that make up `name`, and the factor of their product."""
        yield name, self.files.stored(name)
        product = self.products.get(name)
        if product is not None:
            yield f"{name}:scale", torch.tensor([product.scale], dtype=torch.float64)
            for entry in (product.down, product.up, product.magnitude):
                if entry is not None:
                    yield f"{name}:{entry.name}", entry.read()


def with_adapter(folder: Path, files: FileCheckpoint) -> Checkpoint:
    """Return the weights of `folder` with its adapter merged; without one as they are.

    Raises:
        CheckpointError: The adapter is absent, damaged, or of another model.
        UnsupportedError: It cannot be merged exactly, or the weights are quantized.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return files
    settings = read_settings(read_json(path), path)
    if find_formats(files.config, str(path)):
        raise UnsupportedError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}) beside quantized weights, into which "
            f"nothing can be merged. {MERGE}, with the unquantized model as base."
        )
    if (folder / ADAPTER).is_file():
        apart = read_header(folder / ADAPTER)
        layout = ordinary_names(apart, among_others=files.among_others)
        parts = {name: apart[stored] for name, stored in layout.names.items()}
        if layout.beside:
            told = f"{len(layout.beside)} tensors of the adapter are left out: they change"
            note = f"{told} other parts than the text model."
            files = replace(files, notes=(*files.notes, note))
        return _merge(path, settings, files, parts)
    inside = {name for name in files.names() if _PART.fullmatch(name) or _WHOLE.fullmatch(name)}
    if not inside:
        pickle = folder / f"{Path(ADAPTER).stem}.bin"
        if pickle.is_file():
            raise CheckpointError(
                f"{pickle} is a pickle, which can run code and is never loaded. Convert it once "
                "where you trust it: PeftModel.from_pretrained(base, "
                "folder).save_pretrained(folder)."
            )
        raise CheckpointError(
            f"{path} names an adapter, but {ADAPTER} is not there. Put it there, or remove "
            f"{ADAPTER_CONFIG} if the weights hold the adapter already."
        )
    parts = {name: files.entries[name] for name in inside}
    base = {_plain(name): files.entries[name] for name in files.names() - inside}
    return _merge(path, settings, replace(files, entries=base), parts)


def _plain(name: str) -> str:
    """Return the ordinary name of a weight that an adapter was put beside."""
    found = _BASE.fullmatch(name)
    return f"{found[1]}.{found[2]}" if found else name


def _merge(
    path: Path, settings: LoraSettings, files: FileCheckpoint, parts: dict[str, Entry]
) -> MergedCheckpoint:
    """Return weights with the tensors `parts` of an adapter merged into them."""
    entries, by_module = dict(files.entries), _by_module(path, parts)
    modules = {name.rpartition(".")[0] for name in (TABLE_WEIGHT, HEAD_WEIGHT)}
    held = {module for name in parts for module in modules if name.startswith(f"{module}.")}
    alone = TABLE_WEIGHT in entries and HEAD_WEIGHT not in entries
    if held and alone and is_tied(files.config):
        # The adapter changes one of both; the other stays what the two of them were.
        entries[HEAD_WEIGHT] = entries[TABLE_WEIGHT]
    for name, entry in parts.items():
        if not _PART.fullmatch(name):
            _replace(path, settings, entries, name, entry)
    products = {
        f"{module}.weight": _product(path, settings, entries, module, found)
        for module, found in by_module.items()
    }
    note = (
        f"A LoRA adapter ({ADAPTER_CONFIG}) is merged into {len(products)} matrices, as "
        f"transformers loads it with the weights. Remove {ADAPTER_CONFIG} if the weights hold it "
        "already."
    )
    return MergedCheckpoint(replace(files, entries=entries), products, (*files.notes, note))


def _by_module(path: Path, parts: dict[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Return the tensors of each module's adapter, by their kind."""
    found: dict[str, dict[str, Entry]] = {}
    adapters = set()
    for name, entry in parts.items():
        part = _PART.fullmatch(name)
        if part:
            found.setdefault(part[1], {})[part[2]] = entry
            adapters.add(part[3])
    if len(adapters) > 1:
        told = listing(quoted(sorted(map(str, adapters))))
        raise UnsupportedError(
            f"{path.parent} holds {len(adapters)} adapters: {told}. Which are "
            f"meant cannot be told. {MERGE}."
        )
    return found


def _replace(
    path: Path, settings: LoraSettings, entries: dict[str, Entry], name: str, entry: Entry
) -> None:
    """Put a weight that the adapter holds whole into the place of the base's."""
    whole = _WHOLE.fullmatch(name)
    plain = f"{whole[1]}.{whole[2]}" if whole else _plain(name)
    module, _, suffix = plain.rpartition(".")
    if plain not in entries or suffix not in ("weight", "bias"):
        raise UnsupportedError(
            f"The adapter of {path} holds '{name}', which is not merged here. {MERGE}."
        )
    if settings.is_whole(module) or _is_resized(plain, entry, entries[plain]):
        entries[plain] = entry
    elif not torch.equal(entry.read(), entries[plain].read()):
        raise UnsupportedError(
            f"The adapter of {path} holds a '{plain}' that differs from the weights', and its "
            f"modules_to_save do not name it. {MERGE}."
        )


def _is_resized(name: str, entry: Entry, base: Entry) -> bool:
    """Say whether a table has another number of tokens, which PEFT saves with the adapter."""
    is_table = name in (TABLE_WEIGHT, HEAD_WEIGHT)
    return is_table and entry.shape[:1] != base.shape[:1] and entry.shape[1:] == base.shape[1:]


def _product(
    path: Path,
    settings: LoraSettings,
    entries: dict[str, Entry],
    module: str,
    found: dict[str, Entry],
) -> Product:
    """Return what an adapter adds to a module's weight, its shapes checked."""
    name = f"{module}.weight"
    table = "lora_embedding_A" in found
    names = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A", "lora_B")
    magnitude = found.get("lora_magnitude_vector")
    if name not in entries:
        raise CheckpointError(
            f"The adapter of {path} changes '{name}', which the weights do not hold; use an "
            "adapter of this model."
        )
    if found.keys() - {"lora_magnitude_vector"} != set(names) or (table and magnitude):
        raise UnsupportedError(
            f"The adapter of {path} holds {listing(sorted(found))} for '{module}', which is not "
            f"merged here. {MERGE}."
        )
    if settings.decomposed != (magnitude is not None):
        raise CheckpointError(
            f"{path} gives use_dora = {str(settings.decomposed).lower()}, and the adapter of "
            f"'{module}' holds {'no' if magnitude is None else 'a'} lora_magnitude_vector; use "
            "both of one and the same adapter."
        )
    weight, down, up = entries[name], *(found[each] for each in names)
    rank = down.shape[0] if down.shape else 0
    fitting = (*up.shape[:1], *down.shape[1:])
    fits = weight.shape == (fitting[::-1] if table else fitting) and up.shape[1:] == (rank,)
    if not fits or not rank or (magnitude and magnitude.shape != weight.shape[:1]):
        raise CheckpointError(
            f"The adapter of '{module}' is {list(up.shape)} by {list(down.shape)}, which does not "
            f"fit the weight {list(weight.shape)}; use an adapter of this model."
        )
    for entry in (weight, down, up, magnitude):
        if entry is not None:
            require_weight_dtype(entry.name, entry.dtype, entry.path.name)
    return Product(down, up, settings.scale(_asked(down, module), rank), table, magnitude)


def _asked(down: Entry, module: str) -> str:
    """Return a module's name in the model that was trained, which patterns are written for."""
    part = _PART.fullmatch(down.name)
    return part[1].removeprefix("base_model.model.") if part else module
