"""Caches that go from call to call, in the hands of who calls.

caches = carried(caches, states)         # a sequence that others have begun
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llm_coreml.errors import ArtifactError


def carried(
    caches: Mapping[str, torch.Tensor], states: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return `states` as the caches of the next call.

    Args:
        caches: What a call takes, by name.
        states: What it is to be given, of any float type.

    Raises:
        ArtifactError: a cache is missing, unknown, or of another shape.
    """
    told, wanted = (
        {name: list(value.shape) for name, value in each.items()} for each in (states, caches)
    )
    if told != wanted:
        raise ArtifactError(f"The caches are {told}; the program takes {wanted}.")
    return {name: states[name].to(cache.dtype) for name, cache in caches.items()}
