"""Which family a model is of whose `model_type` has none: by its settings, and by its tensors.

    nearest_type(config)                      # 'qwen2': whose settings it shares most
    readable_as(config, shapes)               # ['qwen2']: whose tensors it has, all and no others
    unread(config, "llama")                   # {'scale_emb': 12}: what that family never heard of

A model that was published with code of its own is most often a known one under another name. Its
tensors tell that with certainty, but for numbers that no tensor shows: those are settings, and what
settings a family has, the configuration classes of `transformers` say.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_coreml.checkpoint.promise import beside
from llm_coreml.checkpoint.weights_view import expected_tensors
from llm_coreml.decoder import skeleton
from llm_coreml.errors import LlmCoreMLError
from llm_coreml.families.family import Family

Shape = tuple[int, ...]

# What changes nothing in what a model computes, whatever its family.
_HARMLESS = (
    "_*", "architectures", "auto_map", "*dropout*", "*_token_id", "*_token_index", "*dtype",
    "*initializer*", "transformers_version", "use_cache", "pretraining_tp", "quantization*",
    "compression_config", "model_type", "tokenizer_class", "attn_implementation", "unsloth*",
    "use_return_dict", "output_*", "gradient_checkpointing", "num_nextn_predict_layers",
    "bos_token", "eos_token", "name_or_path", "task_specific_params", "return_dict*",
)  # fmt: skip


def nearest_type(config: Mapping[str, Any], known: Sequence[str]) -> str | None:
    """Return the model_type whose settings are those of `config`, nearly; None if none is near.

    Args:
        config: `config.json`; settings that are null say nothing.
        known: The model types to choose from, the first preferred.
    """
    keys = {key for key, value in config.items() if value is not None and not _is_harmless(key)}
    shares = {name: len(_settings_of(name) & keys) for name in known}
    best = max(known, key=shares.__getitem__)
    # A few sizes alone say nothing.
    return best if shares[best] > 4 else None


def unread(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return the settings of `config` that say something, and that a family does not have."""
    settings = _settings_of(model_type)
    return {
        key: value
        for key, value in config.items()
        if key not in settings and not _is_harmless(key) and value not in (None, False, [], {})
    }


def readable_as(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    known: Sequence[str],
    load: Callable[[str], Family],
) -> list[str]:
    """Return the model types whose tensors these are, those with the fewest unread settings.

    Args:
        config: `config.json`.
        shapes: Of the tensors of its checkpoint, by name.
        known: The model types to try, the first preferred.
        load: Returns the family of one.
    """
    found = {
        name: len(unread(config, name)) for name in known if _has(config, shapes, name, load(name))
    }
    fewest = min(found.values(), default=0)
    return [name for name, count in found.items() if count == fewest]


def _has(config: Mapping[str, Any], shapes: Mapping[str, Shape], name: str, family: Family) -> bool:
    """Say whether a checkpoint has the tensors of a family, and what lies beside is left out."""
    try:
        spec = family.spec({**config, "model_type": name})
        parameters = skeleton(spec).named_parameters()
        sizes = {each: tuple(parameter.shape) for each, parameter in parameters}
        expected = expected_tensors(family.stored(spec), sizes)
    except LlmCoreMLError:
        return False
    if any(shapes.get(each) != shape for each, shape in expected.items()):
        return False
    surplus = shapes.keys() - expected.keys()
    return all(
        beside(each) or any(fnmatch.fnmatchcase(each, pattern) for pattern in family.ignored)
        for each in surplus
    )


@functools.cache
def _settings_of(model_type: str) -> frozenset[str]:
    """Return the names of what a configuration of this type may say."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    return frozenset({*config.to_dict(), *type(config).attribute_map})


def _is_harmless(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in _HARMLESS)
