"""Attention windows in `config.json`: one width, and which layers have it.

windows(config, count=32, window=4096)      # (4096, None, ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.families.fields import LARGEST_POSITION, flag, shown, whole


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a layer with a window sees, None without one. See `windows`."""
    if config.get("sliding_window") is None:
        return None
    return whole(config, "sliding_window", most=LARGEST_POSITION)


def switched_windows(config: Mapping[str, Any], count: int) -> tuple[int | None, ...]:
    """Return what each layer sees where `use_sliding_window` must be true for a window to count.

    Then `layer_types` says which layers have it, or else all from `max_window_layers` on.

    Raises:
        CheckpointError: see `windows`.
        UnsupportedError: see `windows`.
    """
    window = sliding_window(config) if flag(config, "use_sliding_window") else None
    if config.get("layer_types") is not None or window is None:
        return windows(config, count, window, default=None)
    first = config.get("max_window_layers")
    # Zero is a layer's number, too.
    whole_ones = (
        0 if first == 0 and not isinstance(first, bool) else whole(config, "max_window_layers")
    )
    return tuple(None if index < whole_ones else window for index in range(count))


def windows(
    config: Mapping[str, Any], count: int, window: int | None, default: int | None
) -> tuple[int | None, ...]:
    """Return how many positions each layer sees, None for all before a token.

    Args:
        config: Whose `layer_types` says which layers have a window.
        count: Layers.
        window: Of those that have one.
        default: What each layer sees where `layer_types` is absent or null.

    Raises:
        CheckpointError: `layer_types` is no list of one word for each layer, or names windows
            where there are none.
        UnsupportedError: a layer of another type.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return count * (default,)
    if not isinstance(kinds, list) or len(kinds) != count:
        raise CheckpointError(
            f"config.json gives layer_types = {shown(kinds)}; it must be a list of {count}, one "
            "for each layer. Download or save the model again."
        )
    return tuple(_window_of(kind, window) for kind in kinds)


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
