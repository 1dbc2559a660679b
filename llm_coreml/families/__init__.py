"""Model families: from `config.json` to a `DecoderSpec` and what its parameters are made of.

    family = find_family(config)
    spec = family.spec(config)
    family.stored(spec)["layers.0.mlp.up_proj.weight"].names   # ('model.layers.0.mlp...',)

In come parsed `config.json` files, not trusted; out go data and names. Nothing that comes in is
changed, no tensor is read here, and options that the decoder does not compute are refused. Adding a
family: one file named after its `model_type`, one line in `_MODULES`, one test line. A model_type
that has none is told what it is, and may be read as another family where the user says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from llm_coreml.errors import ConfigError, UnknownFamilyError, nearest
from llm_coreml.families import unknown
from llm_coreml.families.family import Family as Family
from llm_coreml.printable import printable

# model_type in config.json -> file in this folder
_MODULES = {
    "apertus": "apertus",
    "arcee": "arcee",
    "biogpt": "biogpt",
    "bitnet": "bitnet",
    "bloom": "bloom",
    "codegen": "codegen",
    "cohere": "cohere",
    "cohere2": "cohere2",
    "ctrl": "ctrl",
    "cwm": "cwm",
    "ernie4_5": "ernie4_5",
    "exaone": "exaone",
    "exaone4": "exaone4",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "gemma4_text": "gemma4_text",
    "gemma4_unified_text": "gemma4_text",
    "glm": "glm",
    "glm4": "glm4",
    "gpt-sw3": "gpt2",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "gpt_neo": "gpt_neo",
    "gpt_neox": "gpt_neox",
    "gpt_neox_japanese": "gpt_neox_japanese",
    "gptj": "gptj",
    "granite": "granite",
    "granite_swa": "granite_swa",
    "helium": "helium",
    "hunyuan_v1_dense": "hunyuan_v1_dense",
    "hyperclovax": "hyperclovax",
    "internlm3": "internlm3",
    "iquestcoder": "iquestcoder",
    "jais2": "jais2",
    "llama": "llama",
    "ministral": "mistral",
    "ministral3": "ministral3",
    "mistral": "mistral",
    "mpt": "mpt",
    "nanochat": "nanochat",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "openai-gpt": "openai_gpt",
    "opt": "opt",
    "persimmon": "persimmon",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "vaultgemma": "vaultgemma",
    "xglm": "xglm",
}


def known_model_types() -> list[str]:
    """Return every `model_type` that can be exported."""
    return sorted(_MODULES)


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family that `config.json` names.

    Raises:
        UnknownFamilyError: no family of that `model_type`.
    """
    model_type = str(config.get("model_type"))
    if model_type not in _MODULES:
        raise UnknownFamilyError(unknown.refusal(model_type, config, _preferred()))
    return _load(model_type)


def checked_family(model_type: str) -> str:
    """Return the name of a family as it was given. Raises ConfigError if there is none."""
    if model_type not in _MODULES:
        known = ", ".join(known_model_types())
        raise ConfigError(
            f"There is no family '{printable(model_type, 60)}'; there are {known}."
            f"{nearest(model_type, _MODULES)}"
        )
    return model_type


def read_as(config: Mapping[str, Any], family: str | None) -> dict[str, Any]:
    """Return a configuration as one of the family that the user names; None is its own.

    Raises:
        UnsupportedError: it has a family of its own, or settings that change what a model computes
            and that the named family does not have.
    """
    own = str(config.get("model_type"))
    if family in (None, own):
        return dict(config)
    unknown.check_renamed(config, str(family), has_own=own in _MODULES)
    return {**config, "model_type": family}


def family_notes(config: Mapping[str, Any], family: str | None) -> tuple[str, ...]:
    """Return what to know of a configuration that is read as another family's, a sentence each.

    Args:
        config: `config.json`, as it is.
        family: What it is read as; None is its own.
    """
    if family in (None, config.get("model_type")):
        return ()
    return (unknown.note_of_renamed(config, str(family)),)


def offer(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return a sentence on the family whose tensors a checkpoint of no family has; '' if none.

    Args:
        config: `config.json`.
        shapes: Of the checkpoint's tensors, by their ordinary names.
    """
    return unknown.offer(config, shapes, _preferred(), _load)


def _load(model_type: str) -> Family:
    module = importlib.import_module(f"llm_coreml.families.{_MODULES[model_type]}")
    family: Family = module.FAMILY
    return family


def _preferred() -> list[str]:
    """Return all model types, the plain ones first: of several that fit, they promise least."""
    first = [name for name in ("llama", "mistral", "qwen2") if name in _MODULES]
    return [*first, *(name for name in known_model_types() if name not in first)]
