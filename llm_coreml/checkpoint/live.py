"""A checkpoint that is a `transformers` model in memory, as a training script holds it.

It reads like the folder that `save_pretrained` would write, so a fine-tuned model is exported
without a detour over the disk; of tied weights one name is kept, as there.

    open_checkpoint(model, tokenizer=tokenizer)
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, final

import torch

from llm_coreml.checkpoint.checkpoint import Checkpoint, Source, listing, quoted
from llm_coreml.checkpoint.files import check_config, make_tokenizer
from llm_coreml.checkpoint.layouts import ordinary_names
from llm_coreml.checkpoint.live_adapters import adapters_of
from llm_coreml.checkpoint.live_tensors import (
    Dequantized,
    LiveTensor,
    Merged,
    Offloaded,
    TrainedCodes,
    inner_model,
    live_tensors,
)
from llm_coreml.checkpoint.live_tokenizer import check_live_tokenizer, save_live_tokenizer
from llm_coreml.checkpoint.live_trained_codes import SETTINGS, has_rounded_inputs
from llm_coreml.checkpoint.wrappers import text_part
from llm_coreml.errors import CheckpointError, UnsupportedError, nearest
from llm_coreml.quiet import quiet

_WHERE = "the live model"


@final
@dataclasses.dataclass(frozen=True, eq=False)
class LiveCheckpoint(Checkpoint):
    """A checkpoint over a live model's own tensors; see `Checkpoint`.

    Attributes:
        tensors: Tensors by name, one per storage; what they read may be the model's own.
        aliases: Each further name of such a tensor, and its name in `tensors`.
        tokenizer: The tokenizer, in a form that `live_tokenizer` knows, or None.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    source: Source
    tokenizer_files: dict[str, Path]
    tensors: dict[str, LiveTensor] = dataclasses.field(repr=False)
    aliases: dict[str, str] = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)
    notes: tuple[str, ...] = ()

    def names(self) -> frozenset[str]:
        """Return the names of all tensors, one per storage."""
        return frozenset(self.tensors)

    def tied(self) -> dict[str, str]:
        """Return each further name of a tensor, as `{'lm_head.weight': 'model.embed...'}`."""
        return dict(self.aliases)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`."""
        return self._found(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of `name` in the model; a merged weight is computed in fp32."""
        return self._found(name).dtype

    def where(self, name: str) -> str:
        """Return `the live model`."""
        return _WHERE

    def stored(self, name: str) -> torch.Tensor:
        """Return the tensor, on its own device, merged if it has adapters."""
        found = self._found(name)
        with quiet():
            return found.read()

    def _found(self, name: str) -> LiveTensor:
        known = self.aliases.get(name, name)
        if known not in self.tensors:
            raise CheckpointError(
                f"{_WHERE} has no tensor '{name}'.{nearest(name, [*self.tensors, *self.aliases])}"
            )
        return self.tensors[known]

    def save_tokenizer(self, folder: Path) -> dict[str, Path]:
        """Save the live tokenizer and the generation settings into `folder`."""
        if self.tokenizer is None:
            raise CheckpointError(
                "A live model does not hold its tokenizer. "
                "Give both: open_checkpoint(model, tokenizer=tokenizer)."
            )

        def save() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            save_live_tokenizer(self.tokenizer, folder)

        return make_tokenizer(folder, save, self.generation_config or None)


def open_live(model: torch.nn.Module, tokenizer: Any) -> LiveCheckpoint:
    """Open a live `transformers` model; its weights are read when asked for, not copied now.

    Wrappers around it and adapters of PEFT inside of it are read through, see `live_tensors`.

    Raises:
        CheckpointError: It is not a `transformers` model, or its weights are not in memory.
        UnsupportedError: Its adapters cannot be merged, or its weights are quantized or sharded in
            a way that is not read.
        ConfigError: `tokenizer` is none.
    """
    if tokenizer is not None:
        check_live_tokenizer(tokenizer)
    kind, inner = type(model).__name__, inner_model(model)
    config = getattr(inner, "config", None)
    if not callable(getattr(config, "to_json_string", None)):
        raise CheckpointError(
            f"{kind} has no transformers config. Give a transformers causal LM (of a wrapper, the "
            "model inside), a folder or a hub id."
        )
    # Through JSON, so that a live config equals the config.json that would be saved.
    settings = json.loads(config.to_json_string(use_diff=False))  # type: ignore[union-attr]
    with quiet():
        state = live_tensors(inner)
    _check_quantization(settings, kind, state)
    check_config(settings, f"the config of {kind}")
    generation, part = getattr(inner, "generation_config", None), text_part(settings)
    layout = ordinary_names(state, among_others=part.whole is not None)
    sizes = {name: math.prod(state[name].shape) * state[name].dtype.itemsize for name in state}
    beside = part.left_out({name: sizes[name] for name in layout.beside})
    tensors, aliases = _untie({name: state[stored] for name, stored in layout.names.items()})
    return LiveCheckpoint(
        config=part.config,
        generation_config={} if generation is None else json.loads(generation.to_json_string()),
        source=Source("live", _public_name(inner)),
        tokenizer_files={},
        tensors=tensors,
        aliases=aliases,
        tokenizer=tokenizer,
        notes=(*([beside] if beside else []), *layout.notes, *_notes(tensors)),
    )


def _public_name(inner: torch.nn.Module) -> str:
    """Return the hub id that a model was loaded from, else its class: a folder's name is its own.

    transformers notes the commit of what comes from the hub, and of that alone.
    """
    config: Any = inner.config
    if getattr(config, "_commit_hash", None) and config._name_or_path:
        return str(config._name_or_path)
    return type(inner).__name__


def _check_quantization(settings: dict[str, Any], kind: str, state: dict[str, LiveTensor]) -> None:
    """Say of settings what the tensors are: codes, or plain where bitsandbytes' are values."""
    found = settings.get("quantization_config")
    if any(isinstance(each, TrainedCodes) for each in state.values()):
        settings["quantization_config"] = SETTINGS
    elif isinstance(found, dict) and found.get("quant_method") == "bitsandbytes":
        del settings["quantization_config"]
    elif found:
        raise UnsupportedError(
            f"The config of {kind} has a quantization_config: of quantized weights only files are "
            "read, not live models. Give the folder or the hub id, or an unquantized model."
        )


def _notes(tensors: dict[str, LiveTensor]) -> list[str]:
    """Return what to tell of how tensors are read."""
    merged = [each for each in tensors.values() if isinstance(each, Merged)]
    held = [*tensors.values(), *(base for each in merged for base in each.base.values())]
    codes = sum(isinstance(each, Dequantized) for each in held)
    offloaded = sum(isinstance(each, Offloaded) for each in held)
    layers = len({id(each.layer) for each in merged})
    notes = []
    if layers:
        names = sorted({name for each in merged for name in adapters_of(each.layer)})
        notes.append(
            f"{'An adapter' if len(names) == 1 else 'Adapters'} of PEFT "
            f"({listing(quoted(names))}) merged into {layers} layers, in fp32."
        )
    if codes:
        notes.append(
            f"{codes} matrices of bitsandbytes are read as the values that their codes stand for, "
            "which are quantized anew."
        )
    coded = {each.module for each in held if isinstance(each, TrainedCodes)}
    if any(map(has_rounded_inputs, coded)):
        notes.append("What layers read was rounded in training; the export does not round it.")
    if offloaded:
        notes.append(f"{offloaded} tensors are read from where accelerate has offloaded them.")
    return notes


def _untie(state: dict[str, LiveTensor]) -> tuple[dict[str, LiveTensor], dict[str, str]]:
    """Split `state` into one name per storage and the further names of each."""
    tensors: dict[str, LiveTensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        key = tensor.key()
        first = name if key is None else seen.setdefault(key, name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    return tensors, aliases
