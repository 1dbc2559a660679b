"""GLM 4 0414: GLM with a norm behind each part of a layer, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec
from llm_coreml.families import glm
from llm_coreml.families.family import Family
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes

_BEHIND = {
    "attention_out_norm": "post_self_attn_layernorm",
    "mlp_out_norm": "post_mlp_layernorm",
}
_NAMES = replace(glm.NAMES, modules={**glm.NAMES.modules, **_BEHIND})


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a GLM 4 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    plain = glm.spec(config)
    layers = [
        replace(
            layer,
            mixer=replace(layer.mixer, out_norm=plain.norm),
            feed_forward=replace(layer.feed_forward, out_norm=plain.norm),
        )
        for layer in plain.layers
    ]
    return replace(plain, layers=tuple(layers))


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=glm.FAMILY.ignored)
