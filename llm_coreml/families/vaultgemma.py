"""VaultGemma: Gemma 2 without norms behind a layer's parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.checkpoint.value_maps import PlusOne
from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import gemma2, llama
from llm_coreml.families.family import Family
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

_NAMES = Names(modules={"post_attention_layernorm": "pre_feedforward_layernorm"}, gains=PlusOne())


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a VaultGemma `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    whole = gemma2.spec(config)
    layers = (
        LayerSpec(replace(layer.mixer, out_norm=None), replace(layer.feed_forward, out_norm=None))
        for layer in whole.layers
    )
    return replace(whole, layers=tuple(layers))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
