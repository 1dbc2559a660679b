"""Adapters of PEFT in a live model, merged a layer at a time by PEFT itself, in a copy in fp32.

    module, layer = chosen(module)           # the module without adapters, and the layer with them
    merged_copy(layer, values)               # the module, merged

Whatever PEFT can merge is merged so, LoRA and others; the caller's layer stays as it is, and of the
model no more than one layer is there twice. PEFT is asked only where the model has loaded it.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from llm_coreml.checkpoint.live_offloaded import Place, offloaded_by
from llm_coreml.errors import UnsupportedError
from llm_coreml.printable import printable

# What such an adapter adds follows from the input, so no weights say it.
_OF_THE_INPUT = ("XLORA", "POLY", "CARTRIDGE")
# What accelerate, and PEFT for quantized weights, put into a module that is none of its own.
_OTHERS_PUT_IN = ("forward", "_old_forward", "quantization_backend")


def adapter_base(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the model that PEFT's model wraps, None where `model` is none of PEFT's.

    Raises:
        UnsupportedError: its kind of adapter cannot be merged.
    """
    if "peft" not in sys.modules:
        return None
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, (PeftModel, PeftMixedModel)):
        config = model.peft_config[_first(model.active_adapter)]
        kind = str(config.peft_type).rpartition(".")[2]
        tuner = model.base_model
        if not isinstance(tuner, BaseTuner) or kind in _OF_THE_INPUT:
            raise UnsupportedError(
                f"{type(model).__name__} carries an adapter of kind {printable(kind, 60)}, which "
                "cannot be merged into weights: give the model without it."
            )
        model = tuner
    if not isinstance(model, BaseTuner):
        return None
    inside: torch.nn.Module = model.model
    return inside


def _first(names: Any) -> str:
    name: str = names if isinstance(names, str) else names[0]
    return name


def chosen(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """Return the module that runs in the place of `module`, and the layer that adapts it.

    Returns:
        The module, without adapters, and PEFT's layer around it, None where what is to be merged is
        in the weights already, or switched off.

    Raises:
        UnsupportedError: a layer has adapters that cannot be taken apart.
    """
    if "peft" not in sys.modules:
        return module, None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import (
        AuxiliaryTrainingWrapper,
        ModulesToSaveWrapper,
        TrainableTokensWrapper,
    )

    if isinstance(module, ModulesToSaveWrapper):
        on = module.active_adapters if not module.disable_adapters else []
        names = [name for name in on if name in module.modules_to_save]
        return chosen(module.modules_to_save[names[0]] if names else module.original_module)
    if isinstance(module, TrainableTokensWrapper):
        return chosen(module.token_adapter)
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise UnsupportedError(f"{type(module).__name__} of PEFT is not read.")
    if not isinstance(module, BaseTunerLayer):
        return module, None
    acts = any(_acts(each) for each in _layers(module))
    return module.get_base_layer(), module if acts else None


def _layers(layer: Any) -> list[Any]:
    """Return the layers of PEFT that lie around each other, the outermost first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = []
    while isinstance(layer, BaseTunerLayer):
        found.append(layer)
        layer = layer.base_layer
    return found


def _acts(layer: Any) -> bool:
    """Say whether the weights are otherwise than what the layer computes with."""
    if layer.disable_adapters:
        return bool(layer.merged)  # PEFT takes them out again when it runs
    held = {name for kind in layer.adapter_layer_names for name in _keys(layer, kind)}
    return not layer.merged and not held.isdisjoint(layer.active_adapters)


def _keys(layer: Any, kind: str) -> list[str]:
    """Return the adapters of which a layer holds a tensor of this kind."""
    of_kind: Any = getattr(layer, kind, None)
    return list(of_kind.keys()) if hasattr(of_kind, "keys") else []


def adapters_of(layer: torch.nn.Module) -> set[str]:
    """Return the names of the adapters that act in PEFT's layer."""
    return {str(name) for each in _layers(layer) for name in each.active_adapters}


def merged_copy(layer: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return a copy of the module inside of PEFT's layer, in fp32 on the CPU, adapters merged.

    Args:
        layer: PEFT's; it is not changed.
        values: The tensors of the module without adapters, by name.

    Raises:
        UnsupportedError: its kind of adapter cannot be merged.
    """
    with torch.no_grad(), _failing_as(layer):
        base = layer.get_base_layer()  # type: ignore[operator]
        copied = _copied(layer, {id(base): _plain(base, values)})
        for each in reversed(_layers(copied)):
            if each.disable_adapters:
                if each.merged:
                    each.unmerge()
            elif not each.merged:
                each.merge(adapter_names=None)
    inside: torch.nn.Module = copied.get_base_layer()
    return inside


@contextlib.contextmanager
def _failing_as(layer: torch.nn.Module) -> Iterator[None]:
    """Make an error of ours of what PEFT says of a merge."""
    try:
        yield
    except (NotImplementedError, ValueError, RuntimeError, AttributeError) as error:
        raise UnsupportedError(
            f"PEFT cannot merge the adapter of a {type(layer).__name__} "
            f"({printable(str(error), 200)}); give the model without it."
        ) from error


def _plain(base: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Any:
    """Return a copy of a module without adapters that holds `values` in fp32."""
    copied = _copied(base, {}, empty=True)
    if type(base).__module__.partition(".")[0] == "bitsandbytes":
        rows, columns = values["weight"].shape
        copied = torch.nn.Linear(columns, rows, bias="bias" in values, device="meta")
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        held = copied.get_submodule(path)
        tensor = _in_fp32(value)
        if last in held._buffers:
            held._buffers[last] = tensor
        else:
            held._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)
    return copied


def _in_fp32(value: torch.Tensor) -> torch.Tensor:
    """Return a copy of `value` on the CPU, floats in fp32."""
    if isinstance(value, DTensor):
        value = value.to_local()
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True)


def _copied(
    module: torch.nn.Module, known: dict[int, Any], empty: bool = False, place: Place | None = None
) -> Any:
    """Return a copy of a module without hooks, whose tensors are in fp32 on the CPU.

    Args:
        module: What to copy; hooks may hold all of a trainer, so nothing is copied deeply.
        known: The copies of modules that are there already, by the identity of each.
        empty: Leave the tensors out.
        place: Where tensors lie that are offloaded.
    """
    if id(module) in known:
        return known[id(module)]
    made: Any = object.__new__(_unquantized(type(module)))
    known[id(module)] = made
    hooks = {key for key in module.__dict__ if "hook" in key}
    left_out = {*hooks, *_OTHERS_PUT_IN}
    fresh = torch.nn.Module().__dict__
    made.__dict__.update({key: fresh[key] for key in hooks if key in fresh})
    made.__dict__.update(
        {key: _shallow(value) for key, value in module.__dict__.items() if key not in left_out}
    )
    place = offloaded_by(module) or place

    def copied(name: str, value: torch.Tensor) -> torch.Tensor:
        held = place.read(name) if value.is_meta and place is not None else None
        return _in_fp32(value if held is None else held)

    if not empty:
        for name, value in module._parameters.items():
            if value is not None:
                values = copied(name, value)
                made._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
        for name, held in module._buffers.items():
            if held is not None:
                made._buffers[name] = copied(name, held)
    for name, child in module._modules.items():
        inside = place and place.inside(name)
        made._modules[name] = None if child is None else _copied(child, known, empty, inside)
    return made


def _shallow(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _unquantized(kind: type) -> type:
    """Return the class of PEFT's for plain weights where `kind` is that for bitsandbytes'."""
    package, _, last = kind.__module__.rpartition(".")
    if last != "bnb" or not package.startswith("peft.tuners."):
        return kind
    plain = kind.__name__.removesuffix("4bit").removesuffix("8bitLt")
    found: type = getattr(sys.modules[f"{package}.layer"], plain)
    return found
