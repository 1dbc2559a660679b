"""Layers in turn: which have an attention window, and the rotary table of each kind of layer.

seen = turns(config, count=26, window=512, pattern=6)             # (512, ..., None, 512, ...)
rotary = tables_of(config, 256, 32768, full=1e6, sliding=1e4)
layers = in_turn(layer, seen)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import LayerSpec, RopeSpec
from llm_coreml.families.fields import table, whole
from llm_coreml.families.rotary import rope_spec
from llm_coreml.families.windows import windows

_FULL, _SLIDING = "full_attention", "sliding_attention"


def turns(
    config: Mapping[str, Any], count: int, window: int | None, pattern: int
) -> tuple[int | None, ...]:
    """Return what each layer sees, None for all before a token.

    Args:
        config: Its `layer_types` say it, or else its `sliding_window_pattern`: every so manyth
            layer sees all.
        count: Layers.
        window: Of those that have one.
        pattern: The pattern where the file is silent.

    Raises:
        CheckpointError: see `windows`.
        UnsupportedError: see `windows`.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        every = whole(config, "sliding_window_pattern", pattern)
        kinds = [_SLIDING if (index + 1) % every else _FULL for index in range(count)]
    return windows({"layer_types": kinds}, count, window, default=None)


def in_turn(layer: LayerSpec, seen: Sequence[int | None]) -> list[LayerSpec]:
    """Return `layer` for each of what layers see; the second table rotates those with a window."""
    return [
        replace(layer, mixer=replace(layer.mixer, window=window, rope=0 if window is None else 1))
        for window in seen
    ]


def tables_of(
    config: Mapping[str, Any], head_dim: int, positions: int, full: float, sliding: float
) -> tuple[RopeSpec, RopeSpec]:
    """Read the rotary tables of layers that see all, and of those with a window.

    Files of today have a table for each kind in `rope_parameters`; before, `rope_scaling` was of
    those that see all.

    Args:
        config: `config.json`.
        head_dim: Width of one head.
        positions: The longest context that the model is meant for.
        full: The base where the first table has none.
        sliding: The base where the second has none.

    Raises:
        CheckpointError: see `rope_spec`.
        UnsupportedError: see `rope_spec`.
    """
    old = table(config, "rope_scaling")
    return (
        _table_of(config, head_dim, positions, _FULL, full, old),
        _table_of(config, head_dim, positions, _SLIDING, sliding, {}),
    )


def _table_of(
    config: Mapping[str, Any],
    head_dim: int,
    positions: int,
    kind: str,
    theta: float,
    old: Mapping[str, Any],
) -> RopeSpec:
    values = table(table(config, "rope_parameters"), kind) or {"rope_type": "default"}
    alone = {**config, "rope_parameters": {**values, **old}, "rope_scaling": None}
    return rope_spec({**alone, "rope_theta": theta}, head_dim, positions)
