"""Typed reading of `config.json`: each field has a type and a range, and a null means the default.

whole(config, "num_hidden_layers", 32, most=4096)
number(config, "rms_norm_eps", 1e-6, most=1.0)
flag(config, "tie_word_embeddings")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_coreml.errors import CheckpointError
from llm_coreml.printable import whole as whole_number

# No size of a model comes near it, and products of three of them still fit 64 bits.
LARGEST_SIZE = 2**20
# Positions are int32 in every program.
LARGEST_POSITION = 2**31 - 1
# Far beyond any base or factor, far inside fp32.
_LARGEST_NUMBER = 1e30
_SHOWN = 60


def whole(
    config: Mapping[str, Any],
    key: str,
    default: int | None = None,
    where: str = "config.json",
    most: int = LARGEST_SIZE,
) -> int:
    """Return the whole number at `key`, or `default` where it is absent or null.

    Raises:
        CheckpointError: it is of another type, below one or above `most`, or is absent and has no
            default.
    """
    value = _present(config, key, default, where)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _wrong(where, key, value, f"a whole number from 1 to {most}")
    return value


def number(
    config: Mapping[str, Any],
    key: str,
    default: float | None = None,
    where: str = "config.json",
    most: float = _LARGEST_NUMBER,
) -> float:
    """Return the positive number at `key`, or `default` where it is absent or null.

    Raises:
        CheckpointError: as `whole`.
    """
    value = _present(config, key, default, where)
    # NaN is in no range; whole numbers of any length compare with a float.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise _wrong(where, key, value, f"a number above 0, and at most {most:g}")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """Return the truth value at `key`, False where it is absent or null.

    Raises:
        CheckpointError: it is of another type; a text or a number is neither true nor false.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong("config.json", key, value, "true or false")
    return bool(value)


def word(config: Mapping[str, Any], key: str, default: str) -> str:
    """Return the text at `key`, or `default` where it is absent or null.

    Raises:
        CheckpointError: it is of another type.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong("config.json", key, value, "a text")
    return default if value is None else value


def table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the object at `key`, empty where it is absent or null.

    Raises:
        CheckpointError: it is of another type.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _wrong("config.json", key, value, "an object")
    return dict(value or {})


def shown(value: object) -> str:
    """Return a value of a file as a message can show it; it may be of any size."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and not isinstance(value, bool):
        return whole_number(value)
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _wrong(where: str, key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{where} gives {key} = {shown(value)}; it must be {wanted}. Download or save the model "
        "again."
    )


def _present(config: Mapping[str, Any], key: str, default: object, where: str) -> object:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(
            f"{where} has no {key}, which this family needs. Download or save the model again."
        )
    return value
