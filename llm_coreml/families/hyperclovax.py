"""HyperCLOVA X SEED: Granite with norms behind a layer's parts, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.families import granite, llama
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, number
from llm_coreml.families.names import Names, stored
from llm_coreml.families.rotary import rope_notes

_NAMES = Names(modules={"attention_out_norm": "post_norm1", "mlp_out_norm": "post_norm2"})


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a HyperCLOVA X `config.json`, whose `logits_scaling` is a factor.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    plain = granite.spec(config)
    told = config.get("attention_multiplier") is not None
    behind = plain.norm if flag({"use_post_norm": True, **config}, "use_post_norm") else None

    def changed(layer: LayerSpec) -> LayerSpec:
        scale = layer.mixer.scale if told else None
        mixer = replace(layer.mixer, scale=scale, out_norm=behind)
        return replace(
            layer, mixer=mixer, feed_forward=replace(layer.feed_forward, out_norm=behind)
        )

    logits = number(config, "logits_scaling", 1.0)
    return replace(plain, layers=tuple(map(changed, plain.layers)), logits_multiplier=logits)


FAMILY = Family(spec, lambda spec: stored(spec, _NAMES), rope_notes, ignored=llama.FAMILY.ignored)
