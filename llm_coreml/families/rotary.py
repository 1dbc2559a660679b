"""Rotary position embedding in `config.json`, its spellings old and new, as transformers has them.

rope_spec(config, dim=64, positions=8192)
rope_notes(config)                      # what the file says twice, and which of it counts

There are `rope_parameters` (transformers 5) and `rope_scaling` beside `rope_theta` (before). Tools
that stretch a context add the old spelling to files of the new one; transformers then takes
`rope_scaling`, whole, and nothing of `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from llm_coreml.decoder.spec import RopeKind, RopeSpec
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.families.fields import LARGEST_POSITION, number, shown, table, whole

_THETA = 10000.0
_OLD, _NEW = "rope_scaling", "rope_parameters"
_TRAINED = "original_max_position_embeddings"
_LARGEST_FACTOR = 1e6
_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
_PARAMETERS = frozenset({"type", "rope_type", "rope_theta", _TRAINED, *_FACTORS})


def rope_spec(config: Mapping[str, Any], dim: int, positions: int) -> RopeSpec:
    """Read the rotary table of a model whose layers share one.

    Args:
        config: `config.json`.
        dim: How many numbers of a head are rotated.
        positions: The longest context that the model is meant for.

    Raises:
        CheckpointError: a parameter is missing, of another type or out of range.
        UnsupportedError: a scaling that the decoder does not compute.
    """
    values = _values(config)
    kind = _kind(values)
    if kind not in get_args(RopeKind):
        raise UnsupportedError(
            f"config.json scales RoPE by {shown(kind)}; supported are "
            f"{', '.join(get_args(RopeKind))}."
        )
    layered = [key for key, value in values.items() if isinstance(value, Mapping)]
    if not _PARAMETERS.issuperset(layered):
        raise UnsupportedError(
            f"config.json gives RoPE parameters of their own to layers of the kind "
            f"{shown(layered[0])}; the layers of this family have one table in common."
        )
    # transformers reads the share of a head where it scales, and its Llama cannot rotate a share.
    share = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind != "default" and share not in (None, 1):
        raise UnsupportedError(
            f"config.json gives partial_rotary_factor = {shown(share)} beside {kind} scaling of "
            "RoPE; this family rotates whole heads."
        )
    return _rope_spec(kind, dim, values, config, positions)


def rope_notes(config: Mapping[str, Any]) -> list[str]:
    """Return a sentence for everything that the file says twice and differently."""
    old, new, values = table(config, _OLD), table(config, _NEW), _values(config)
    notes = []
    if old and new and _meaning(old) != _meaning(new):
        notes.append(
            f"config.json holds {_OLD} ({shown(_kind(old))}) and {_NEW} ({shown(_kind(new))}), "
            f"which differ; transformers takes {_OLD} alone, and so does this export."
        )
    named = values.get("type")
    if named is not None and _kind(values) != named:
        notes.append(
            f"config.json names the scaling of RoPE twice, type {shown(named)} and rope_type "
            f"{shown(_kind(values))}; transformers takes rope_type, and so does this export."
        )
    outer, inner = config.get("rope_theta"), values.get("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        notes.append(
            f"config.json gives rope_theta twice, {shown(outer)} beside the sizes and "
            f"{shown(inner)} in {_OLD if old else _NEW}; transformers takes the second, and so "
            "does this export."
        )
    return notes


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    return table(config, _OLD) or table(config, _NEW)


def _kind(values: Mapping[str, Any]) -> Any:
    return values.get("rope_type") or values.get("type") or "default"


def _meaning(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters without what may be spelled in two ways."""
    rest = {key: value for key, value in values.items() if key not in ("type", "rope_type")}
    return {"rope_theta": None, **rest, "rope_type": _kind(values)}


def _rope_spec(
    kind: RopeKind, dim: int, values: dict[str, Any], config: Mapping[str, Any], positions: int
) -> RopeSpec:
    scaled = kind in ("linear", "llama3")
    by_band = kind == "llama3"
    where = f"The {kind} scaling of RoPE in config.json"

    def factor(key: str) -> float:
        return number(values, key, where=where, most=_LARGEST_FACTOR)

    low = factor("low_freq_factor") if by_band else 1.0
    high = factor("high_freq_factor") if by_band else 4.0
    if not high > low:
        raise CheckpointError(
            f"config.json gives high_freq_factor = {high} and low_freq_factor = {low}; the first "
            "must be the larger. Download or save the model again."
        )
    trained = positions
    if by_band:
        # As transformers looks it up: beside the sizes first, then among the parameters.
        inner = whole(values, _TRAINED, positions, where, LARGEST_POSITION)
        trained = whole(config, _TRAINED, inner, most=LARGEST_POSITION)
    return RopeSpec(
        dim=dim,
        theta=number(values, "rope_theta", number(config, "rope_theta", _THETA)),
        kind=kind,
        factor=factor("factor") if scaled else 1.0,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=trained,
    )
