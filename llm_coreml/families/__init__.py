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
from llm_coreml.families.shape import shape_of
from llm_coreml.printable import printable

# model_type in config.json -> file in this folder
_MODULES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
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
        raise UnsupportedError(_refusal(model_type, config))
    module = importlib.import_module(f"llm_coreml.families.{_MODULES[model_type]}")
    family: Family = module.FAMILY
    return family


def _refusal(model_type: str, config: Mapping[str, Any]) -> str:
    """Return what to say of a model_type without a family: what it is nearest to, and in what."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known, shape = ", ".join(known_model_types()), shape_of(config)
    told = f"model_type '{printable(model_type, 60)}' is not supported; supported are {known}."
    if model_type not in CONFIG_MAPPING_NAMES:
        return (
            f"{told} transformers has no such architecture either: it is misspelt, or brings code "
            f"of its own, which is not run.{nearest(model_type, _MODULES)}"
        )
    if shape.nearest is None:
        return (
            f"{told} By its config.json it is {shape.told}, while these are dense decoders. Give a "
            "model of one of these types."
        )
    return (
        f"{told} By its config.json it is nearest in shape to '{shape.nearest}': {shape.told}. It "
        "is not read as one, since parts that config.json does not name may differ. Give a model "
        "of one of these types."
    )
