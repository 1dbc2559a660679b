"""Model families: from `config.json` to a `DecoderSpec` and what its parameters are made of.

    family = find_family(config)
    spec = family.spec(config)
    family.stored(spec)["layers.0.mlp.up_proj.weight"].names   # ('model.layers.0.mlp...',)

In come parsed `config.json` files, not trusted; out go data and names. Nothing that comes in is
changed, no tensor is read here, and options that the decoder does not compute are refused. Adding a
family: one file named after its `model_type`, one line in `_MODULES`, one test line.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from llm_coreml.errors import UnsupportedError, nearest
from llm_coreml.families.family import Family as Family

# model_type in config.json -> file in this folder
_MODULES = {
    "llama": "llama",
    "mistral": "mistral",
}


def known_model_types() -> list[str]:
    """Return every `model_type` that can be exported."""
    return sorted(_MODULES)


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family that `config.json` names.

    Raises:
        UnsupportedError: no family of that `model_type`.
    """
    model_type = str(config.get("model_type"))
    if model_type not in _MODULES:
        raise UnsupportedError(
            f"There is no family for model_type '{model_type}'; known are "
            f"{', '.join(known_model_types())}.{nearest(model_type, _MODULES)}"
        )
    module = importlib.import_module(f"llm_coreml.families.{_MODULES[model_type]}")
    family: Family = module.FAMILY
    return family
