"""Layers in turn: which have an attention window, and the rotary table of each kind of layer.

windows = turns(config, count=26, window=512, pattern=6)          # (512, ..., None, 512, ...)
local = table_of(config, 256, 32768, SLIDING, theta=10000.0)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.decoder.spec import RopeSpec
from llm_coreml.families.fields import table, whole
from llm_coreml.families.rotary import rope_spec
from llm_coreml.families.windows import windows

FULL, SLIDING = "full_attention", "sliding_attention"


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
        kinds = [SLIDING if (index + 1) % every else FULL for index in range(count)]
    return windows({"layer_types": kinds}, count, window, default=None)


def table_of(
    config: Mapping[str, Any], head_dim: int, positions: int, kind: str, theta: float
) -> RopeSpec:
    """Read the rotary table of a kind of layers.

    Files of today have a table for each kind in `rope_parameters`; before, `rope_scaling` was of
    those that see all.

    Args:
        config: `config.json`.
        head_dim: Width of one head.
        positions: The longest context that the model is meant for.
        kind: `FULL` or `SLIDING`.
        theta: The base where the table has none.

    Raises:
        CheckpointError: see `rope_spec`.
        UnsupportedError: see `rope_spec`.
    """
    values = table(table(config, "rope_parameters"), kind) or {"rope_type": "default"}
    if kind == FULL:
        values.update(table(config, "rope_scaling"))
    alone = {**config, "rope_parameters": values, "rope_scaling": None, "rope_theta": theta}
    return rope_spec(alone, head_dim, positions)
