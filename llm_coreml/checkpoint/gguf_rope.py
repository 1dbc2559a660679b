"""Rotary embedding of a GGUF file, in words of `config.json`: metadata, and tensors of factors.

    rope_of(own, "rope", path)                   # {"rope_type": "yarn", "rope_theta": 1e6, ...}
    with_scaling(config, factors, path)          # what 'rope_freqs.weight' holds
    rope_scaling(factors, theta)                 # {"rope_type": "llama3", ...}

The scaling of Llama 3 is stored as a tensor: what each frequency is divided by. LongRoPE has two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_coreml.errors import CheckpointError, UnsupportedError

ADVICE = "Put the model's config.json beside the file, or give the safetensors it was made from."
Factors = np.ndarray[Any, Any]

# What Llama 3.1 and 3.2 have, beside the factor.
_LOW, _HIGH, _TRAINED = 1.0, 4.0, 8192
_TOLERANCE = 1e-4
_THETA = 10000.0
# What divides a frequency by more than this makes it none.
_NEVER = 1e20
# YaRN's numbers, as config.json calls them.
_YARN = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_attn_factor": "attention_factor",
}
_STRETCH, _LOG = "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier"
_ATTENTION = "rope.scaling.attn_factor"
_BASES = ("rope.freq_base", "rope.freq_base_swa")
ROPE_KEYS = (
    *_BASES,
    *_YARN,
    _STRETCH,
    _LOG,
    _ATTENTION,
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)


def number(own: Mapping[str, Any], key: str, path: Path) -> int | float:
    """Return a number of the metadata. Raises CheckpointError for anything else."""
    value = own[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = "one for each layer" if isinstance(value, dict) else repr(value)
        raise CheckpointError(f"{path} gives {key} = {shown}; it must be one number. {ADVICE}")
    return value


def rope_of(own: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the table that all layers, or those that see everything, share.

    Args:
        own: Metadata of the architecture, without its name.
        path: The file.

    Raises:
        CheckpointError: a number is none.
        UnsupportedError: a part of a scaling that `config.json` cannot say.
    """
    found: dict[str, Any] = {"rope_theta": base_of(own, path), "rope_type": _kind(own)}
    kind = found["rope_type"]
    if own.get(_STRETCH, 1.0) != 1.0 or own.get(_LOG, 1.0) not in (0.0, 1.0):
        key = _STRETCH if own.get(_STRETCH, 1.0) != 1.0 else _LOG
        raise UnsupportedError(f"{path} gives {key}, of which config.json has no like. {ADVICE}")
    if kind == "default":
        return found
    trained = own.get("rope.scaling.original_context_length")
    if trained is not None:
        found["original_max_position_embeddings"] = trained
    if kind != "longrope":
        found["factor"] = _factor(own)
    if kind == "longrope" and _ATTENTION in own:
        found["attention_factor"] = number(own, _ATTENTION, path)
    if kind == "yarn":
        found |= {name: number(own, key, path) for key, name in _YARN.items() if key in own}
        if own.get(_LOG) == 1.0:
            found |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    return found


def base_of(own: Mapping[str, Any], path: Path, of_windows: bool = False) -> float:
    """Return the base of the frequencies, of all layers or of those with a window."""
    key = _BASES[of_windows]
    return float(number(own, key, path)) if key in own else _THETA


def _kind(own: Mapping[str, Any]) -> str:
    kind = own.get("rope.scaling.type", "none")
    if "rope.scale_linear" in own and "rope.scaling.type" not in own and _factor(own) != 1:
        kind = "linear"
    return "default" if kind == "none" else str(kind)


def _factor(own: Mapping[str, Any]) -> Any:
    keys = ("rope.scaling.factor", "rope.scale_linear")
    return next((own[key] for key in keys if key in own), 1)


def with_long_factors(
    config: dict[str, Any], short: Factors, long: Factors, made: bool, path: Path
) -> None:
    """Add LongRoPE's factors to a config made here, or compare the two.

    Args:
        config: Changed in place if it was made here.
        short: What each frequency is divided by within the trained length, `[dim / 2]`.
        long: The same beyond it.
        made: The config was made of the file.
        path: The file.

    Raises:
        UnsupportedError: the config says others.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    own = {"short_factor": short.tolist(), "long_factor": long.tolist()}
    if made:
        config["rope_parameters"] = {**rope, "rope_type": "longrope", **own}
        return
    for name, factors in own.items():
        told = rope.get(name)
        if not isinstance(told, list) or not _close(told, factors):
            raise UnsupportedError(
                f"The factors of LongRoPE in {path} are not the {name} of config.json. Put the "
                "config.json of this model beside the file."
            )


def _close(told: list[Any], factors: list[float]) -> bool:
    numbers = [value for value in told if isinstance(value, (int, float))]
    return len(numbers) == len(factors) and bool(
        np.allclose(numbers, factors, rtol=_TOLERANCE, atol=0)
    )


def with_scaling(config: dict[str, Any], factors: Factors | None, path: Path) -> None:
    """Add to a config made here the scaling that `rope_freqs.weight` holds, or compare the two.

    Args:
        config: Changed in place, unless it names a scaling.
        factors: What each frequency is divided by, `[dim / 2]`; None is no tensor.
        path: The file.

    Raises:
        UnsupportedError: the factors are no scaling that is known, or not that of the config.
    """
    if factors is None or bool(np.all(factors == 1)):
        return
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type"))
    found = rope_scaling(factors, theta)
    if kind in (None, "default"):
        if found is None:
            raise UnsupportedError(
                f"'rope_freqs.weight' in {path} scales RoPE by factors of {factors.min():g} to "
                f"{factors.max():g}, which are not those of a scaling that is known. {ADVICE}"
            )
        config["rope_parameters"] = {"rope_theta": theta, **found}
    elif found is None or not _same(rope, found, factors, theta):
        raise UnsupportedError(
            f"'rope_freqs.weight' in {path} scales RoPE by other factors than config.json does "
            f"({kind}). Put the config.json of this model beside the file."
        )


def with_share(config: dict[str, Any], factors: Factors, made: bool, path: Path) -> None:
    """Add to a config made here how much of a head Gemma 4 turns, or compare the two.

    Frequencies that are to be nought are divided by a number beyond all others.

    Args:
        config: Changed in place if it was made here.
        factors: What each frequency of layers that see everything is divided by, `[dim / 2]`.
        made: The config was made of the file.
        path: The file.

    Raises:
        UnsupportedError: the factors are others, or the config turns another share.
    """
    turned = int((factors == 1).sum())
    if not bool(np.all(factors[:turned] == 1)) or not bool(np.all(factors[turned:] > _NEVER)):
        raise UnsupportedError(
            f"'rope_freqs.weight' in {path} scales RoPE by factors of {factors.min():g} to "
            f"{factors.max():g}, which say of no share of a head that it is turned. {ADVICE}"
        )
    rope = config.get("rope_parameters")
    whole = rope.get("full_attention") if isinstance(rope, dict) else None
    if not isinstance(whole, dict):
        return  # defaults of the family
    share = turned / len(factors)
    if made:
        whole["partial_rotary_factor"] = share
    elif whole.get("partial_rotary_factor", 1.0) != share:
        raise UnsupportedError(
            f"'rope_freqs.weight' in {path} turns {share:g} of each head, and config.json "
            f"{whole.get('partial_rotary_factor')}. Put the config.json of this model beside the "
            "file."
        )


def rope_scaling(factors: Factors, theta: float) -> dict[str, Any] | None:
    """Return Llama 3's scaling that gives `factors`, None if there is none.

    Wavelengths below `positions / high` are kept, those above `positions / low` get the whole
    factor, and between them one over the factor is linear in one over the wavelength.
    """
    factor = float(f"{factors.max():.6g}")  # stored as fp32
    if not math.isfinite(factor) or factor <= 1 or float(factors.min()) < 1 - _TOLERANCE:
        return None
    usual = _parameters(factor, _LOW, _HIGH, _TRAINED)
    if _gives(usual, factors, theta):
        return usual
    turns = 1 / _wavelengths(len(factors), theta)
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (share > _TOLERANCE) & (share < 1 - _TOLERANCE)
    if int(between.sum()) < 2:
        return None
    # share = (positions * turns - low) / (high - low); only ratios count, so low is one.
    slope, start = np.polyfit(turns[between], share[between], 1)
    if not start < 0 < slope:
        return None
    high = 1 - 1 / start
    found = _parameters(factor, _LOW, float(high), round(float(slope * (high - 1))))
    return found if _gives(found, factors, theta) else None


def _same(rope: Mapping[str, Any], found: dict[str, Any], factors: Factors, theta: float) -> bool:
    named = {name: rope.get(name) for name in found}
    numbers = [value for name, value in named.items() if name != "rope_type"]
    return (
        named["rope_type"] == found["rope_type"]
        and all(isinstance(value, (int, float)) and value > 0 for value in numbers)
        and _gives(named, factors, theta)
    )


def _parameters(factor: float, low: float, high: float, positions: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": positions,
    }


def _gives(parameters: Mapping[str, Any], factors: Factors, theta: float) -> bool:
    """Say whether a scaling gives these factors."""
    waves = _wavelengths(len(factors), theta)
    factor, positions = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if not high > low:
        return False
    share = np.clip((positions / waves - low) / (high - low), 0, 1)
    return bool(np.allclose(1 / ((1 - share) / factor + share), factors, rtol=_TOLERANCE, atol=0))


def _wavelengths(count: int, theta: float) -> Factors:
    return 2 * math.pi * theta ** (np.arange(count) / count)
