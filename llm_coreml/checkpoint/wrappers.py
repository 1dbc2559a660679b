"""The text model inside a model of several modalities, as most new ones are published.

    part = text_part(config)                 # of {"model_type": "gemma3", "text_config": {...}}
    part.config["model_type"]                # 'gemma3_text', with what holds for the whole model
    part.left_out({"model.vision_tower.norm.weight": 2304})     # a sentence of it

A causal LM as it is comes back as it is. Pictures and sounds are not read here, and what a text
alone makes of such a model is what its text model makes of it: towers and projectors are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from llm_coreml.checkpoint.checkpoint import listing
from llm_coreml.checkpoint.layouts import ordinary_name
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.printable import printable

# Where the configuration of the text model lies; all but the first in repositories with own code.
_PARTS = ("text_config", "llm_config", "language_config")
_QUANTIZED = ("quantization_config", "compression_config", "quantization")
# What is said of the whole model and holds for its text model, too.
_INHERITED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", *_QUANTIZED,
)  # fmt: skip
# Their prompt is read in both directions, with a picture before it.
_TWO_WAYS = ("paligemma", "colpali", "git", "kosmos-2", "kosmos-2.5")
_TIED = "tie_word_embeddings"


@final
@dataclass(frozen=True)
class TextPart:
    """What of a checkpoint is a causal LM.

    Attributes:
        config: Its configuration.
        whole: The `model_type` of the model around it, None if there is none.
    """

    config: dict[str, Any]
    whole: str | None

    def left_out(self, sizes: Mapping[str, int]) -> str | None:
        """Return a sentence about what is not read.

        Args:
            sizes: Bytes of each tensor that is no part of the text model, by its stored name.
        """
        if self.whole is None:
            return None
        told = f"'{printable(self.whole, 60)}' is a model of several modalities, of which the text "
        if not sizes:
            return f"{told}model alone is read."
        parts: Counter[str] = Counter()
        for name, size in sizes.items():
            parts[_part_of(name)] += size
        shown = [f"{printable(part, 40)} ({size:,} bytes)" for part, size in parts.most_common()]
        return f"{told}model alone is read; {len(sizes)} tensors are left out: {listing(shown)}."


def text_part(config: dict[str, Any]) -> TextPart:
    """Return the text model that a parsed `config.json` describes, or describes among others.

    Raises:
        CheckpointError: the configuration of the text model is no object, or names no type.
        UnsupportedError: the model does not write text, or does not read it as its text model does.
    """
    kind = str(config.get("model_type"))
    key = next((key for key in _PARTS if config.get(key) is not None), None)
    if key is None:
        return TextPart(config, None)
    text = config[key]
    if not isinstance(text, Mapping):
        raise CheckpointError(
            f"config.json gives {key} of type {type(text).__name__}; it must be an object. "
            "Download or save the model again."
        )
    _refuse_others(kind)
    found = {**text, **{key: config[key] for key in _INHERITED if config.get(key) is not None}}
    found |= {key: _renamed(found[key]) for key in _QUANTIZED if key in found}
    found.setdefault("model_type", _default_type(kind))
    if not isinstance(found["model_type"], str):
        raise CheckpointError(
            f"config.json gives the text model of '{printable(kind, 60)}' no model_type. "
            "Use the config.json that model.save_pretrained(folder) writes."
        )
    # The head is one of the whole model's parts.
    tied = config.get(_TIED, _default_tie(kind, text))
    return TextPart(found if tied is None else {**found, _TIED: tied}, kind)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Say whether a text model's head is its token table, by its configuration.

    Where that says nothing, as many published ones do, transformers' default of its type holds.
    """
    tied = config.get(_TIED)
    if tied is None:
        tied = getattr(_default(str(config.get("model_type"))), _TIED, None)
    return tied is True


def _refuse_others(kind: str) -> None:
    """Raise UnsupportedError for a model that is no text model with something before it."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind in _TWO_WAYS:
        raise UnsupportedError(
            f"model_type '{kind}' reads its prompt in both directions, which no causal LM does. "
            "Give the text model that it was made from."
        )
    writing = {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    }
    if kind in CONFIG_MAPPING_NAMES and kind not in writing:
        raise UnsupportedError(
            f"model_type '{kind}' does not write text: its text part only reads it, to compare or "
            "to steer. Give a causal LM, or a model that answers in text."
        )


def _renamed(settings: object) -> object:
    """Return settings of quantized weights whose rules for modules name those of the text model."""
    if not isinstance(settings, Mapping):
        return settings
    return {
        ordinary_name(key) if isinstance(key, str) and "." in key else key: value
        for key, value in settings.items()
    }


def _default(kind: str) -> Any:
    """Return the configuration that transformers gives a model of which nothing is said.

    Of a type that must be told something, that is the class, whose attributes are what it need not.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[kind]()
    except (StrictDataclassError, TypeError, ValueError):
        return CONFIG_MAPPING[kind]


def _default_type(kind: str) -> str | None:
    """Return the `model_type` of a text model that names none, as old files do."""
    inner = getattr(_default(kind), "text_config", None)
    return getattr(inner, "model_type", None)


def _default_tie(kind: str, text: Mapping[str, Any]) -> object:
    """Return whether the head is the token table where the whole model's part says nothing.

    transformers ties by the whole model's configuration; of models that it does not know, that of
    the text model is all there is.
    """
    return getattr(_default(kind), _TIED, text.get(_TIED))


def _part_of(name: str) -> str:
    """Return the part of the whole model that a tensor belongs to."""
    inner = name.removeprefix("model.")
    return inner.partition(".")[0]
