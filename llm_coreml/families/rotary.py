"""Rotary position embedding in `config.json`, its spellings old and new, as transformers has them.

rope_spec(config, head_dim=64, positions=8192)
rope_spec(config, 64, 8192, share=0.5)  # a family that rotates a part of each head
rope_spec(config, 64, 8192, layer_type="sliding_attention")
rope_notes(config)                      # what the file says twice, and which of it counts

There are `rope_parameters` (transformers 5) and `rope_scaling` beside `rope_theta` (before). Tools
that stretch a context add the old spelling to files of the new one; transformers then takes
`rope_scaling`, whole, and nothing of `rope_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from llm_coreml.decoder.rope_spec import RopeKind, RopeSpec
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.families.fields import LARGEST_POSITION, flag, number, shown, table, whole

_THETA = 10000.0
_OLD, _NEW = "rope_scaling", "rope_parameters"
_TRAINED, _SHARE = "original_max_position_embeddings", "partial_rotary_factor"
_LARGEST_FACTOR = 1e6
# What is said of one table, and may be an object or a list.
_PARAMETERS = frozenset({"type", "rope_type", "rope_theta", _TRAINED, "factor", "short_factor",
                         "long_factor", "low_freq_factor", "high_freq_factor"})  # fmt: skip


def rope_spec(
    config: Mapping[str, Any],
    head_dim: int,
    positions: int,
    *,
    share: float | None = None,
    theta: float = _THETA,
    layer_type: str | None = None,
) -> RopeSpec:
    """Read a rotary table.

    Args:
        config: `config.json`.
        head_dim: Width of one head.
        positions: The longest context that the model is meant for.
        share: How much of a head is rotated where the file is silent; None is all of it always.
        theta: The base where the file is silent.
        layer_type: Whose table, in a file that may give kinds of layers tables of their own.

    Raises:
        CheckpointError: a parameter is missing, of another type or out of range.
        UnsupportedError: a scaling that the decoder does not compute.
    """
    outer = rope_values(config)
    values = _of_layers(outer, layer_type)
    kind = rope_kind(values)
    if kind not in get_args(RopeKind):
        raise UnsupportedError(
            f"config.json scales RoPE by {shown(kind)}; supported are "
            f"{', '.join(get_args(RopeKind))}."
        )
    plain = RopeSpec(
        dim=_dim(kind, values, config, head_dim, share),
        theta=number(values, "rope_theta", number(config, "rope_theta", theta)),
        original_max_position_embeddings=_trained(kind, values, config, positions),
    )
    where = f"The {kind} scaling of RoPE in config.json"
    if kind in ("linear", "dynamic"):
        return replace(plain, kind=kind, factor=_factor(values, "factor", where))
    if kind == "llama3":
        return _llama3(plain, values, where)
    if kind == "yarn":
        truncate = outer.get("truncate") is None or flag(outer, "truncate")
        return replace(_yarn(plain, values, positions, where), truncate=truncate)
    if kind == "longrope":
        return _longrope(plain, values, positions, where)
    if kind == "proportional":
        part = _share(values, config, 1.0 if share is None else share)
        factor, pairs = _factor(values, "factor", where, 1.0), int(part * head_dim // 2)
        return replace(plain, kind=kind, factor=factor, pairs=pairs)
    return plain


def rope_notes(config: Mapping[str, Any]) -> list[str]:
    """Return a sentence for everything that the file says twice and differently."""
    old, new, values = table(config, _OLD), table(config, _NEW), rope_values(config)
    notes = []
    if old and new and _meaning(old) != _meaning(new):
        notes.append(
            f"config.json holds {_OLD} ({shown(rope_kind(old))}) and {_NEW} "
            f"({shown(rope_kind(new))}), which differ; transformers takes {_OLD} alone, and so "
            "does this export."
        )
    named = values.get("type")
    if named is not None and rope_kind(values) != named:
        notes.append(
            f"config.json names the scaling of RoPE twice, type {shown(named)} and rope_type "
            f"{shown(rope_kind(values))}; transformers takes rope_type, and so does this export."
        )
    outer, inner = config.get("rope_theta"), values.get("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        notes.append(
            f"config.json gives rope_theta twice, {shown(outer)} beside the sizes and "
            f"{shown(inner)} in {_OLD if old else _NEW}; transformers takes the second, and so "
            "does this export."
        )
    return notes


def rope_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a `config.json` says of RoPE, in the spelling that counts."""
    return table(config, _OLD) or table(config, _NEW)


def rope_kind(values: Mapping[str, Any]) -> Any:
    """Return the name of the scaling in what `rope_values` gave, which may be of any type."""
    return values.get("rope_type") or values.get("type") or "default"


def renamed_scaling(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a `config.json` whose scaling has its present name, by what `names` says."""
    values = rope_values(config)
    kind = rope_kind(values)
    if not isinstance(kind, str) or kind not in names:
        return dict(config)
    return {**config, _OLD: {**values, "rope_type": names[kind]}}


def _meaning(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters without what may be spelled in two ways."""
    rest = {key: value for key, value in values.items() if key not in ("type", "rope_type")}
    return {"rope_theta": None, **rest, "rope_type": rope_kind(values)}


def _of_layers(values: dict[str, Any], layer_type: str | None) -> dict[str, Any]:
    """Return the parameters of one table."""
    layered = [key for key, value in values.items() if isinstance(value, Mapping)]
    if layer_type is not None and layer_type in layered:
        return dict(values[layer_type])
    if not _PARAMETERS.issuperset(layered):
        raise UnsupportedError(
            f"config.json gives RoPE parameters of their own to layers of the kind "
            f"{shown(layered[0])}; the layers of this family have one table in common."
        )
    return values


def _dim(
    kind: RopeKind,
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    head_dim: int,
    share: float | None,
) -> int:
    """Return how many numbers of a head are rotated."""
    given = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind == "proportional" or (share is None and (kind == "default" or given in (None, 1))):
        return head_dim
    # transformers reads the share of a head where it scales, and its Llama cannot rotate a share.
    if share is None:
        raise UnsupportedError(
            f"config.json gives partial_rotary_factor = {shown(given)} beside {kind} scaling of "
            "RoPE; this family rotates whole heads."
        )
    dim = int(head_dim * _share(values, config, share))
    if dim % 2 or not dim:
        raise UnsupportedError(
            f"config.json has {dim} numbers of each head of {head_dim} rotated; the decoder "
            "rotates pairs."
        )
    return dim


def _share(values: Mapping[str, Any], config: Mapping[str, Any], default: float) -> float:
    """Return the share of a head that is rotated: of the parameters, else beside the sizes."""
    return number(values, _SHARE, number(config, _SHARE, default, most=1.0), most=1.0)


def _trained(
    kind: RopeKind, values: Mapping[str, Any], config: Mapping[str, Any], positions: int
) -> int:
    """Return the context before the scaling: beside the sizes first, then among the parameters."""
    if kind not in ("llama3", "yarn", "longrope"):
        return positions
    where = f"The {kind} scaling of RoPE in config.json"
    inner = whole(values, _TRAINED, positions, where, LARGEST_POSITION)
    return whole(config, _TRAINED, inner, most=LARGEST_POSITION)


def _factor(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    return number(values, key, default, where, _LARGEST_FACTOR)


def _llama3(rope: RopeSpec, values: Mapping[str, Any], where: str) -> RopeSpec:
    low, high = (_factor(values, f"{end}_freq_factor", where) for end in ("low", "high"))
    if not high > low:
        raise CheckpointError(
            f"config.json gives high_freq_factor = {high} and low_freq_factor = {low}; the first "
            "must be the larger. Download or save the model again."
        )
    factor = _factor(values, "factor", where)
    return replace(rope, kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: RopeSpec, values: Mapping[str, Any], positions: int, where: str) -> RopeSpec:
    """Add what YaRN has: where nothing else is said, scores grow with the factor's logarithm."""

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    given = {key: value for key, value in values.items() if value != 0}  # as if it were absent
    factor = _factor(values, "factor", where, positions / rope.original_max_position_embeddings)
    attention = growth(1.0)
    if given.get("mscale") is not None and given.get("mscale_all_dim") is not None:
        own, all_ = (_factor(given, key, where) for key in ("mscale", "mscale_all_dim"))
        attention = growth(own) / growth(all_)
    return replace(
        rope,
        kind="yarn",
        factor=factor,
        attention_factor=_factor(values, "attention_factor", where, attention),
        beta_fast=_factor(given, "beta_fast", where, 32.0),
        beta_slow=_factor(given, "beta_slow", where, 1.0),
    )


def _longrope(rope: RopeSpec, values: Mapping[str, Any], positions: int, where: str) -> RopeSpec:
    """Add what LongRoPE has: factors for each pair, and one for scores."""
    trained = rope.original_max_position_embeddings
    factor = _factor(values, "factor", where, positions / trained)
    attention = 1.0
    if factor > 1 and trained > 1:
        attention = math.sqrt(1 + math.log(factor) / math.log(trained))
    return replace(
        rope,
        kind="longrope",
        factor=factor,
        attention_factor=_factor(values, "attention_factor", where, attention),
        short_factors=_factors(values, "short_factor", where),
        long_factors=_factors(values, "long_factor", where),
    )


def _factors(values: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    """Return a list of factors, one for each pair."""
    given = values.get(key)
    if not isinstance(given, list):
        raise CheckpointError(
            f"{where} gives {key} = {shown(given)}; it must be a list of numbers, one for each "
            "pair that is rotated. Download or save the model again."
        )
    return tuple(_factor({key: factor}, key, where) for factor in given)
