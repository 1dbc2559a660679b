"""A checkpoint that is a `transformers` model in memory, as a training script holds it.

It reads like the folder that `save_pretrained` would write, so a fine-tuned model is exported
without a detour over the disk; of tied weights one name is kept, as there.

    open_checkpoint(model, tokenizer=tokenizer)
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, final

import torch

from llm_coreml.checkpoint.checkpoint import Checkpoint, Source
from llm_coreml.checkpoint.files import check_config, make_tokenizer
from llm_coreml.checkpoint.layouts import ordinary_names
from llm_coreml.checkpoint.live_tokenizer import check_live_tokenizer, save_live_tokenizer
from llm_coreml.checkpoint.wrappers import text_part
from llm_coreml.errors import CheckpointError, UnsupportedError, nearest

_WHERE = "the live model"


@final
@dataclasses.dataclass(frozen=True, eq=False)
class LiveCheckpoint(Checkpoint):
    """A checkpoint over a live model's own tensors; see `Checkpoint`.

    Attributes:
        tensors: Tensors by name, one per storage. They are the model's: never written to.
        aliases: Each further name of such a tensor, and its name in `tensors`.
        tokenizer: The tokenizer, in a form that `live_tokenizer` knows, or None.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    source: Source
    tokenizer_files: dict[str, Path]
    tensors: dict[str, torch.Tensor] = dataclasses.field(repr=False)
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
        return tuple(self.stored(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of `name` in the model."""
        return self.stored(name).dtype

    def where(self, name: str) -> str:
        """Return `the live model`."""
        return _WHERE

    def stored(self, name: str) -> torch.Tensor:
        """Return the model's own tensor, on its own device."""
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

    Raises:
        CheckpointError: It is not a `transformers` model, or its weights are not in memory.
        UnsupportedError: It carries PEFT adapters or quantized weights.
        ConfigError: `tokenizer` is none.
    """
    if tokenizer is not None:
        check_live_tokenizer(tokenizer)
    kind = type(model).__name__
    _refuse_adapters(model)
    config = getattr(model, "config", None)
    if not callable(getattr(config, "to_json_string", None)):
        raise CheckpointError(
            f"{kind} has no transformers config. Give a transformers causal LM (of a wrapper, the "
            "model inside), a folder or a hub id."
        )
    # Through JSON, so that a live config equals the config.json that would be saved.
    settings = json.loads(config.to_json_string(use_diff=False))  # type: ignore[union-attr]
    if settings.get("quantization_config"):
        raise UnsupportedError(
            f"The config of {kind} has a quantization_config: of quantized weights only files are "
            "read, not live models. Give the folder or the hub id, or an unquantized model."
        )
    check_config(settings, f"the config of {kind}")
    generation, part = getattr(model, "generation_config", None), text_part(settings)
    state = model.state_dict()
    layout = ordinary_names(state, among_others=part.whole is not None)
    beside = part.left_out({name: state[name].nbytes for name in layout.beside})
    tensors, aliases = _untie({name: state[stored] for name, stored in layout.names.items()})
    return LiveCheckpoint(
        config=part.config,
        generation_config={} if generation is None else json.loads(generation.to_json_string()),
        source=Source("live", getattr(config, "_name_or_path", "") or kind),
        tokenizer_files={},
        tensors=tensors,
        aliases=aliases,
        tokenizer=tokenizer,
        notes=(*([beside] if beside else []), *layout.notes),
    )


def _refuse_adapters(model: torch.nn.Module) -> None:
    """Raise UnsupportedError for PEFT adapters, with advice that the model's class can follow."""
    kind, merge = type(model).__name__, "Merge them first: "
    if any(cls.__module__.split(".")[0] == "peft" for cls in type(model).__mro__):
        # A PeftModel hands on what its kind of adapter can do.
        if callable(getattr(model, "merge_and_unload", None)):
            advice = f"{merge}model = model.merge_and_unload()."
        else:
            advice = "They are of a kind that cannot be merged: give the model without them."
    elif getattr(model, "_hf_peft_config_loaded", False):
        advice = (
            f"{merge}model.save_pretrained(folder) writes the adapter alone; load the model again "
            "without it, then model = PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    elif any(".base_layer." in name for name in model.state_dict()):
        advice = (
            f"{merge}model = peft_model.merge_and_unload(), where peft_model is the PeftModel that "
            "this model is inside of."
        )
    else:
        return
    raise UnsupportedError(f"{kind} carries PEFT adapters, which are not exported. {advice}")


def _untie(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Split `state` into one name per storage and the further names of each."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedError(
                f"'{name}' is a {type(tensor).__name__}: quantized or sharded tensors cannot be "
                "read yet. Give a model with plain tensors, as from_pretrained(model_id) loads it."
            )
        if tensor.is_meta:
            raise CheckpointError(
                f"'{name}' is on the meta device, without data. "
                "Load the model without offloading: from_pretrained(model_id, device_map='cpu')."
            )
        # The same bytes seen as the same tensor; a different view of them is a tensor of its own.
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = seen.setdefault(key, name) if tensor.numel() else name
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    return tensors, aliases
