"""Granite with windows: attention sinks, and a rotary table of each layer's own, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import CheckpointError
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, number, shown
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes
from llm_coreml.families.windows import sliding_window, windows

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    "vocab_size": 100352,
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "tie_word_embeddings": True,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a `config.json` of Granite with windows.

    Raises:
        CheckpointError: see `llama.spec`; also for bases of RoPE that are no list of numbers.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    scale = number(config, "attention_multiplier", 1.0)
    attention = replace(read.biased_attention, scale=scale, sinks=True)
    mlp = replace(read.mlp, bias=flag(config, "mlp_bias"))
    window, bases = sliding_window(read.config), _bases(read)
    tables = {base: index for index, base in enumerate(dict.fromkeys(filter(None, bases)))}
    kinds = config.get("layer_types") or [
        "sliding_attention" if index % 4 else "full_attention" for index in range(read.count)
    ]
    seen = windows({"layer_types": kinds}, read.count, window, default=None)
    layers = [
        LayerSpec(replace(attention, window=each, rope=tables.get(base)), mlp)
        for each, base in zip(seen, bases, strict=True)
    ]
    return replace(
        read.decoder(layers, [replace(read.rope, theta=base) for base in tables]),
        embedding_multiplier=number(config, "embedding_multiplier", 1.0),
        residual_multiplier=number(config, "residual_multiplier", 1.0),
        logits_multiplier=1 / number(config, "logits_scaling", 1.0),
    )


def _bases(read: Dense) -> list[float]:
    """Return the base of each layer's rotary table, 0 for none."""
    given = read.config.get("layer_rope_theta")
    if given is None:
        return [read.rope.theta] * read.count
    if not isinstance(given, list) or len(given) != read.count:
        raise CheckpointError(
            f"config.json gives layer_rope_theta = {shown(given)}; it must be a list of "
            f"{read.count}, one for each layer. Download or save the model again."
        )
    key = "layer_rope_theta"
    return [0.0 if not each else number({key: each}, key) for each in given]


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
