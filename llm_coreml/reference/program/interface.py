"""What goes into a model: the types of its interface, and whether a tensor is what it describes."""

from __future__ import annotations

import torch

from llm_coreml.artifact.mil import Feature
from llm_coreml.errors import ArtifactError

INTERFACE_TYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int32": torch.int32,
    "int8": torch.int8,
}


def check_input(feature: Feature, value: torch.Tensor, wanted: torch.dtype) -> None:
    """Refuse an input of another type or shape than the model takes.

    Args:
        feature: What the model tells of it.
        value: What is given.
        wanted: The type in which it may come, too.

    Raises:
        ArtifactError: as said.
    """
    name, shape = feature.name, tuple(value.shape)
    if value.dtype not in (wanted, INTERFACE_TYPES[feature.dtype]):
        raise ArtifactError(f"The input '{name}' is {value.dtype}; the model takes {wanted}.")
    if feature.enumerated:
        if shape not in feature.enumerated:
            allowed = ", ".join(str(list(item)) for item in feature.enumerated)
            raise ArtifactError(
                f"The input '{name}' has shape {list(shape)}, which is not enumerated; "
                f"allowed are {allowed}."
            )
    elif feature.ranges:
        fits = len(shape) == len(feature.ranges) and all(
            low <= size and (high is None or size <= high)
            for size, (low, high) in zip(shape, feature.ranges, strict=True)
        )
        if not fits:
            limits = ", ".join(
                f"{low}..{'' if high is None else high}" for low, high in feature.ranges
            )
            raise ArtifactError(
                f"The input '{name}' has shape {list(shape)}; allowed is [{limits}]."
            )
    elif shape != feature.shape:
        raise ArtifactError(
            f"The input '{name}' has shape {list(shape)}; the model takes {list(feature.shape)}."
        )
