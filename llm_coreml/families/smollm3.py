"""SmolLM3: Llama, every fourth layer of which rotates nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec, LayerSpec
from llm_coreml.errors import CheckpointError
from llm_coreml.families import llama
from llm_coreml.families.dense import Dense
from llm_coreml.families.family import Family
from llm_coreml.families.fields import flag, shown, whole
from llm_coreml.families.names import stored
from llm_coreml.families.rotary import rope_notes, rope_spec
from llm_coreml.families.windows import sliding_window, windows

# transformers' own defaults where config.json is silent.
_DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a SmolLM3 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`; also for `no_rope_layers` that is no list of numbers.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    attention = read.biased_attention
    mlp = replace(read.mlp, bias=flag(config, "mlp_bias"))
    rotated, window = _rotated(read), sliding_window(read.config)
    if config.get("layer_types") is not None:
        seen = windows(config, read.count, window, default=None)
    else:
        windowed = flag(config, "use_sliding_window")
        seen = tuple(window if windowed and not rotates else None for rotates in rotated)
    layers = [
        LayerSpec(replace(attention, rope=0 if rotates else None, window=each), mlp)
        for rotates, each in zip(rotated, seen, strict=True)
    ]
    rope = rope_spec(read.config, read.head_dim, read.positions, theta=2000000.0)
    return read.decoder(layers, (rope,))


def _rotated(read: Dense) -> list[bool]:
    """Say of each layer whether it rotates queries and keys."""
    given = read.config.get("no_rope_layers")
    if given is None:
        interval = whole(read.config, "no_rope_layer_interval", 4)
        return [(index + 1) % interval != 0 for index in range(read.count)]
    known = isinstance(given, list) and all(each in (0, 1) for each in given)
    if not known or len(given) < read.count:
        raise CheckpointError(
            f"config.json gives no_rope_layers = {shown(given)}; it must be a list of "
            f"{read.count} numbers, 0 or 1, one for each layer. Download or save the model again."
        )
    return [bool(each) for each in given[: read.count]]


FAMILY = Family(spec, stored, rope_notes, ignored=llama.FAMILY.ignored)
