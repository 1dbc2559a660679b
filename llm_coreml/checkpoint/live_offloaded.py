"""Where accelerate keeps the tensors of a module that it brings into memory when the module runs.

place = offloaded_by(module) or place
place.read("weight")                     # None where it does not keep that
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch


@final
@dataclass(frozen=True)
class Place:
    """A map of accelerate's, and how the names of a module's tensors begin in it.

    Attributes:
        weights: Tensors in memory or in files, by name.
        prefix: What stands before the names.
    """

    weights: Mapping[str, torch.Tensor]
    prefix: str = ""

    def inside(self, name: str) -> Place:
        """Return the place of a module's child."""
        return Place(self.weights, f"{self.prefix}{name}.")

    def read(self, name: str) -> torch.Tensor | None:
        """Return a tensor of the module, None where it is not there."""
        return self.weights[f"{self.prefix}{name}"] if self.holds(name) else None

    def holds(self, name: str) -> bool:
        """Say whether a tensor of the module is there."""
        return f"{self.prefix}{name}" in self.weights


def offloaded_by(module: torch.nn.Module) -> Place | None:
    """Return where accelerate's hook on a module has put its tensors, None without one."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            return Place(weights)
    return None
