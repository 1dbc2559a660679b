"""The tensors of a model in memory under plain names, whatever training has wrapped around them.

    tensors = live_tensors(model)
    tensors["model.norm.weight"].read()      # never to be written to, on the device where it lies

Taken off are wrappers of the whole model, the adapters of PEFT (`live_adapters`), offloading by
accelerate and the codes of bitsandbytes. Nothing is copied until a tensor is read, and the model
stays as it is.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch.distributed.tensor import DTensor

from llm_coreml.checkpoint.live_adapters import adapter_base, chosen, merged_copy
from llm_coreml.checkpoint.live_codes import is_of_bitsandbytes, shape_of, values_of
from llm_coreml.checkpoint.live_offloaded import Place, offloaded_by
from llm_coreml.checkpoint.live_trained_codes import (
    PARTS,
    has_codebook,
    has_trained_codes,
    idle_codebook,
    rounded_weight,
)
from llm_coreml.errors import CheckpointError, UnsupportedError

# Where the model is inside of what wraps all of it: torch.compile, DataParallel and DeepSpeed,
# Lightning Fabric, FSDP, TRL's models with a value head.
_INSIDE = ("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "pretrained_model")
_GATHER = (
    "Gather it on one process first: torch.distributed.checkpoint.state_dict.get_model_state_dict("
    "model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)), loaded into a plain "
    "model."
)


class LiveTensor(abc.ABC):
    """A tensor that can be read.

    Attributes:
        shape: Its shape.
        dtype: The type in which it is read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abc.abstractmethod
    def read(self) -> torch.Tensor:
        """Return the values, not to be written to. Raises UnsupportedError."""

    def key(self) -> tuple[object, ...] | None:
        """Return what two names of one tensor have in common, None where that is not known."""
        return None


@final
@dataclass(frozen=True, eq=False)
class Held(LiveTensor):
    """A tensor that lies in memory as it is.

    Attributes:
        tensor: The model's own.
    """

    tensor: torch.Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.tensor.shape))
        object.__setattr__(self, "dtype", self.tensor.dtype)

    def read(self) -> torch.Tensor:
        """Return the model's own tensor."""
        return self.tensor

    def key(self) -> tuple[object, ...] | None:
        """Return bytes and layout: a different view of the same bytes is a tensor of its own."""
        held = self.tensor
        if not held.numel():
            return None
        return held.device, held.data_ptr(), held.dtype, held.shape, held.stride()


@final
@dataclass(frozen=True, eq=False)
class Offloaded(LiveTensor):
    """A tensor that accelerate brings into memory when a module runs.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        place: Where it lies until then.
        name: Its name there.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    place: Place
    name: str

    def read(self) -> torch.Tensor:
        """Return it from memory, or from the file that it was offloaded to."""
        found = self.place.read(self.name)
        assert found is not None
        return found.to(self.dtype)


@final
@dataclass(frozen=True, eq=False)
class Dequantized(LiveTensor):
    """The values of a matrix of bitsandbytes, in fp32.

    Attributes:
        shape: The shape of the values.
        module: Where it is.
        codes: The module's parameter.
    """

    shape: tuple[int, ...]
    module: torch.nn.Module
    codes: torch.Tensor
    dtype: torch.dtype = torch.float32

    def read(self) -> torch.Tensor:
        """Return the values that the codes stand for."""
        return values_of(self.module, self.codes)


@final
@dataclass(frozen=True, eq=False)
class Merged(LiveTensor):
    """A tensor of a layer with its adapters merged in fp32.

    Attributes:
        shape: Its shape.
        layer: PEFT's layer, adapters and all.
        name: The tensor's name in the layer without them.
        base: The tensors of the layer without them, by name.
    """

    shape: tuple[int, ...]
    layer: torch.nn.Module
    name: str
    base: Mapping[str, LiveTensor]
    dtype: torch.dtype = torch.float32

    def read(self) -> torch.Tensor:
        """Merge a copy of this layer alone, and return the tensor."""
        values = {name: tensor.read() for name, tensor in self.base.items()}
        return merged_copy(self.layer, values).get_parameter(self.name).detach()


@final
@dataclass(frozen=True, eq=False)
class TrainedCodes(LiveTensor):
    """A part of what stands for a matrix of torchao: codes, scales or zero points.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        module: Where the matrix is.
        path: What a message calls it.
        part: The part of torchao's tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    module: torch.nn.Module
    path: str
    part: str

    def read(self) -> torch.Tensor:
        """Return the part, computed anew of a layer in training."""
        found: torch.Tensor = getattr(rounded_weight(self.module, self.path), self.part)
        return found.detach()


def inner_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside of what wraps all of it, adapters taken off from around it."""
    while True:
        held = next((name for name in _INSIDE if name in model._modules), None)
        wraps = held == "_orig_mod" or not hasattr(getattr(model, "config", None), "to_json_string")
        if held is None or not wraps:
            inside = adapter_base(model)
            if inside is None:
                return model
            model = inside
        else:
            model = model._modules[held] or model


def live_tensors(model: torch.nn.Module) -> dict[str, LiveTensor]:
    """Return the parameters and buffers that `model.state_dict()` would name, without wrappers.

    Raises:
        CheckpointError: one is without data.
        UnsupportedError: one is of a kind that is not read, or lies on several processes.
    """
    found: dict[str, LiveTensor] = {}
    _collect(model, "", None, found)
    return found


def _collect(
    module: torch.nn.Module, prefix: str, place: Place | None, found: dict[str, LiveTensor]
) -> None:
    module, layer = chosen(module)
    place = offloaded_by(module) or place
    if layer is not None:
        base: dict[str, LiveTensor] = {}
        if has_trained_codes(module) or has_codebook(module):
            raise UnsupportedError(
                f"'{prefix}weight' is rounded in training and has an adapter: one cannot be merged "
                "into the other. Export either, or merge and train on."
            )
        _collect(module, "", offloaded_by(layer) or place, base)
        for name, each in base.items():
            found[prefix + name] = Merged(each.shape, layer, name, base)
        return
    persistent = {
        name: value
        for name, value in module._buffers.items()
        if name not in module._non_persistent_buffers_set
    }
    coded = has_trained_codes(module)
    if coded:
        found.update(_codes(module, prefix))
    for name, value in {**module._parameters, **persistent}.items():
        if value is not None and not (coded and name == "weight"):
            found[prefix + name] = _tensor(prefix + name, value, module, name, place)
    idle = idle_codebook(module)
    for name, child in module._modules.items():
        if child is not None and name != idle:
            _collect(child, f"{prefix}{name}.", place and place.inside(name), found)


def _codes(module: torch.nn.Module, prefix: str) -> dict[str, LiveTensor]:
    """Return the parts of a matrix of codes, by the names under which torchao saves them."""
    path, found = f"{prefix}weight", dict[str, LiveTensor]()
    weight = rounded_weight(module, path)
    for name, part in PARTS.items():
        value = getattr(weight, part)
        shape = tuple(value.shape)
        found[prefix + name] = TrainedCodes(shape, value.dtype, module, path, part)
    return found


def _tensor(
    path: str, value: torch.Tensor, module: torch.nn.Module, name: str, place: Place | None
) -> LiveTensor:
    if isinstance(value, DTensor):
        if value.device_mesh.size() > 1:
            raise UnsupportedError(
                f"'{path}' is sharded over {value.device_mesh.size()} processes. {_GATHER}"
            )
        value = value.to_local().detach()
    if hasattr(value, "ds_id"):
        raise UnsupportedError(f"'{path}' is sharded by DeepSpeed's ZeRO-3. {_GATHER}")
    if name == "_flat_param":
        raise UnsupportedError(f"'{path}' is many tensors that FSDP has made one. {_GATHER}")
    if is_of_bitsandbytes(value):
        return Dequantized(shape_of(value), module, value)
    if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise UnsupportedError(
            f"'{path}' is a {type(value).__name__}: quantized or sharded tensors cannot be "
            "read yet. Give a model with plain tensors, as from_pretrained(model_id) loads it."
        )
    if not value.is_meta:
        return Held(value.detach())
    if place is not None and place.holds(name):
        return Offloaded(tuple(value.shape), value.dtype, place, name)
    raise CheckpointError(
        f"'{path}' is on the meta device, without data. "
        "Load the model without offloading: from_pretrained(model_id, device_map='cpu')."
    )
