"""Mistral: Llama's graph without biases, with a sliding window unless `config.json` has a null."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.families import llama
from llm_coreml.families.family import Family
from llm_coreml.families.fields import LARGEST_POSITION, shown, whole
from llm_coreml.families.rotary import rope_notes

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a Mistral `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    known = {**_DEFAULTS, **config}
    whole_context = llama.llama_spec(known)
    windows = _windows(known, len(whole_context.layers))
    layers = (
        replace(layer, mixer=replace(layer.mixer, window=window))
        for layer, window in zip(whole_context.layers, windows, strict=True)
    )
    return replace(whole_context, layers=tuple(layers))


def _windows(config: Mapping[str, Any], count: int) -> list[int | None]:
    """Return how many positions each layer sees, None for all before a token."""
    window = None
    if config["sliding_window"] is not None:
        window = whole(config, "sliding_window", most=LARGEST_POSITION)
    kinds = config.get("layer_types")
    if kinds is None:
        return count * [window]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise CheckpointError(
            f"config.json gives layer_types = {shown(kinds)}; it must be a list of {count}, one "
            "for each layer. Download or save the model again."
        )
    return [_window_of(kind, window) for kind in kinds]


def _window_of(kind: object, window: int | None) -> int | None:
    if kind == "full_attention":
        return None
    if kind != "sliding_attention":
        raise UnsupportedError(
            f"config.json has layers of the type {shown(kind)}; this family computes "
            "full_attention and sliding_attention."
        )
    if window is None:
        raise CheckpointError(
            "config.json has layers of the type sliding_attention and no sliding_window; download "
            "or save the model again."
        )
    return window


FAMILY = Family(spec, llama.stored, rope_notes, ignored=llama.FAMILY.ignored)
