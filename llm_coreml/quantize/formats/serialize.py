"""Quantized tensors as plain tensors and JSON, and back.

kind, parts = to_parts(weight)
weight = from_parts(kind, lambda name: parts[name])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchao.prototype.quantization.codebook_coreml import CodebookQuantizedTensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from llm_coreml.quantize.formats.lookup import LookupTensor

# Only these are made from a file: what their constructors take, tensors first, and last of all
# those that may be None.
_TYPES: dict[str, tuple[Any, list[str], list[str], list[str]]] = {
    "codebook": (
        CodebookQuantizedTensor,
        CodebookQuantizedTensor.tensor_data_attrs,
        CodebookQuantizedTensor.tensor_attributes,
        [],
    ),
    "integers": (
        IntxUnpackedToInt8Tensor,
        IntxUnpackedToInt8Tensor.tensor_data_names,
        IntxUnpackedToInt8Tensor.tensor_attribute_names,
        [],
    ),
    "lookup": (
        LookupTensor,
        LookupTensor.tensor_data_names,
        LookupTensor.tensor_attribute_names,
        LookupTensor.optional_tensor_data_names,
    ),
}


def to_parts(weight: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what kind of tensor `weight` is, as JSON values, and its parts by name.

    Raises:
        TypeError: it is of a type that cannot be stored.
    """
    for name, (cls, parts, attributes, optional) in _TYPES.items():
        if isinstance(weight, cls):
            values = [_to_json(getattr(weight, attribute)) for attribute in attributes]
            present = [part for part in optional if getattr(weight, part) is not None]
            tensors = {part: getattr(weight, part) for part in (*parts, *present)}
            return {"type": name, "attributes": values, "optional": present}, tensors
    raise TypeError(f"a {type(weight).__name__} cannot be stored")


def from_parts(kind: dict[str, Any], part: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Return the tensor that `to_parts` took apart.

    Args:
        kind: What kind of tensor it is.
        part: Gives a part by its name.

    Raises:
        KeyError: the kind is unknown.
    """
    cls, parts, _, optional = _TYPES[kind["type"]]
    attributes = [_from_json(value) for value in kind["attributes"]]
    last = (part(name) if name in kind["optional"] else None for name in optional)
    made: torch.Tensor = cls(*(part(name) for name in parts), *attributes, *last)
    return made


def moved(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor, quantized or not, on `device`; torchao's own cannot all be moved."""
    if not any(isinstance(weight, cls) for cls, *_ in _TYPES.values()):
        return weight.to(device)
    kind, parts = to_parts(weight)
    return from_parts(kind, lambda name: parts[name].to(device))


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (tuple, list)):
        return [_to_json(item) for item in value]
    if value is None or isinstance(value, int):
        return value
    raise TypeError(f"{value!r} cannot be stored")


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return _dtype(value["dtype"])
    return [_from_json(item) for item in value] if isinstance(value, list) else value


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch.{name} is no type of numbers")
    return found
