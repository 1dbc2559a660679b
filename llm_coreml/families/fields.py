"""Typed reading of `config.json`: a null means the default, another type is an error.

whole(config, "num_hidden_layers")                    # required
number(config, "rms_norm_eps", 1e-6)                  # with a default
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.errors import CheckpointError


def whole(
    config: Mapping[str, Any], key: str, default: int | None = None, where: str = "config.json"
) -> int:
    """Return the whole number at `key`, or `default` where it is absent or null.

    Raises:
        CheckpointError: it is of another type or below one, or is absent and has no default.
    """
    value = _present(config, key, default, where)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{where} gives {key} = {value!r}; it must be a whole number of at least 1. "
            "Download or save the model again."
        )
    return value


def number(
    config: Mapping[str, Any], key: str, default: float | None = None, where: str = "config.json"
) -> float:
    """Return the positive number at `key`, or `default` where it is absent or null.

    Raises:
        CheckpointError: as `whole`.
    """
    value = _present(config, key, default, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise CheckpointError(
            f"{where} gives {key} = {value!r}; it must be a number above 0. Download or save "
            "the model again."
        )
    return float(value)


def table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the object at `key`, empty where it is absent or null.

    Raises:
        CheckpointError: it is of another type.
    """
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json gives {key} = {value!r}; it must be an object.")
    return dict(value)


def _present(config: Mapping[str, Any], key: str, default: object, where: str) -> object:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(
            f"{where} has no {key}, which this family needs. Download or save the model again."
        )
    return value
