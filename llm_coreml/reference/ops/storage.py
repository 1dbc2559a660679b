"""Core ML's element types in torch: what holds the values of each.

Every floating value is computed in float32; how what is declared fp16 is kept in between is for
`numerics` to say. Integers keep their width, except the unsigned ones that torch computes poorly,
which get the next signed type.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch

from llm_coreml.errors import ArtifactError

# By MIL's names; the reference computes with no other type.
STORAGE: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "bool": torch.bool,
        "fp16": torch.float32,
        "fp32": torch.float32,
        "int8": torch.int8,
        "int16": torch.int16,
        "int32": torch.int32,
        "int64": torch.int64,
        "int4": torch.int8,
        "uint8": torch.uint8,
        "uint16": torch.int32,
        "uint32": torch.int64,
        "uint4": torch.uint8,
        "uint2": torch.uint8,
        "uint1": torch.uint8,
        "uint6": torch.uint8,
        "uint3": torch.uint8,
    }
)


def storage(name: str) -> torch.dtype:
    """Return the torch type that holds values declared as `name`.

    Raises:
        ArtifactError: the reference does not compute with this type.
    """
    found = STORAGE.get(name)
    if found is None:
        raise ArtifactError(f"The reference runtime does not compute with values of type {name}.")
    return found


def to_tensor(array: np.ndarray, name: str) -> torch.Tensor:
    """Copy `array` into a tensor of the storage type of `name`, with the same shape and values."""
    target = storage(name)
    if array.dtype == np.uint16 or array.dtype == np.uint32:
        array = array.astype(np.int64)
    # A copy: the array may be a read-only view of a mapped file.
    return torch.from_numpy(np.array(array, order="C")).to(target)
