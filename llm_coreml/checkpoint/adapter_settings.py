"""What an `adapter_config.json` of PEFT says of a LoRA adapter: the factor of each of its products.

    settings = read_settings(Path("model/adapter_config.json"))
    settings.scale("model.layers.0.self_attn.q_proj", rank=16)    # alpha / r, say

Only what is known to leave the merged weights as they are computed here is accepted; whatever else
is set to something is refused, since an adapter that is half understood is another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.printable import printable

# How to get there without us.
MERGE = (
    "Merge it first: PeftModel.from_pretrained(base, folder).merge_and_unload()"
    ".save_pretrained(merged)"
)

# Read here, or without a say in what merged weights are.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Beginnings of a training that leave the base model alone; PiSSA and others change it.
_BEGINNINGS = (None, True, False, "gaussian", "eva")
# A pattern is a regular expression of a stranger's: one that takes long must be no such.
_PATTERN = re.compile(r"\^?[\w.-]*(\.\*[\w.-]*)?\$?")
_LONGEST_PATTERN = 200


@final
@dataclass(frozen=True)
class LoraSettings:
    """How the matrices of an adapter are multiplied.

    Attributes:
        rank: Columns of each first matrix, where `ranks` names no other.
        alpha: What a product is multiplied by, before it is divided by the rank.
        ranks: Ranks by patterns of modules' names.
        alphas: The same of alphas.
        rooted: Divided by the root of the rank instead (rsLoRA).
        decomposed: The rows of every sum get norms of their own (DoRA).
        whole: How the names of modules end that the adapter holds whole (`modules_to_save`).
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rooted: bool
    decomposed: bool
    whole: tuple[str, ...]

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of a module's product, whose first matrix has `rank` rows.

        Raises:
            CheckpointError: the settings give the module another rank.
        """
        wanted, alpha = _by_pattern(self.ranks, module), _by_pattern(self.alphas, module)
        wanted = self.rank if wanted is None else wanted
        alpha = self.alpha if alpha is None else alpha
        if rank != wanted:
            raise CheckpointError(
                f"The adapter of '{module}' has rank {rank}, and adapter_config.json gives "
                f"{wanted:g}; use both of one and the same adapter."
            )
        return alpha / (math.sqrt(rank) if self.rooted else rank)

    def is_whole(self, module: str) -> bool:
        """Say whether the adapter holds a module whole; as in PEFT `norm` is `layernorm` too."""
        return module.endswith(self.whole)


def read_settings(values: Mapping[str, Any], path: Path) -> LoraSettings:
    """Read the parsed content of `path`.

    Raises:
        CheckpointError: a field is missing or of another type.
        UnsupportedError: it is no LoRA, or of a kind whose merged weights are not computed here.
    """
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f"{path} is of peft_type {printable(repr(kind), 60)}; only LoRA is merged here. "
            f"{MERGE}, or remove adapter_config.json if the weights hold it already."
        )
    begun = values.get("init_lora_weights")
    unknown = sorted(key for key, value in values.items() if value and key not in _KNOWN)
    if begun not in _BEGINNINGS:
        unknown.append("init_lora_weights")
    if unknown:
        key = unknown[0]
        raise UnsupportedError(
            f"{path} gives {printable(key, 60)} = {printable(repr(values[key]), 60)}, which is not "
            f"computed here. {MERGE}."
        )
    return LoraSettings(
        rank=int(_number(values, "r", 8, path, whole=True)),
        alpha=_number(values, "lora_alpha", 8, path),
        ranks={
            key: int(value) for key, value in _patterns(values, "rank_pattern", path, True).items()
        },
        alphas=_patterns(values, "alpha_pattern", path, False),
        rooted=values.get("use_rslora") is True,
        decomposed=values.get("use_dora") is True,
        whole=_names(values, "modules_to_save", path),
    )


def _number(
    values: Mapping[str, Any], key: str, default: float, path: Path, whole: bool = False
) -> float:
    value = values.get(key, default)
    proper = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not proper or not 0 < value < 2**31 or (whole and value != int(value)):
        kind = "whole number above 0" if whole else "number above 0"
        raise CheckpointError(
            f"{path} gives {printable(key, 60)} = {printable(repr(value), 60)}; it must be a "
            f"{kind}."
        )
    return float(value)


def _patterns(values: Mapping[str, Any], key: str, path: Path, whole: bool) -> dict[str, float]:
    found = values.get(key) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} gives {key} of type {type(found).__name__}, not an object.")
    for pattern in found:
        if len(pattern) > _LONGEST_PATTERN or not _PATTERN.fullmatch(pattern):
            raise UnsupportedError(
                f"{path} has the {key} {printable(repr(pattern), 60)}, which is not read here. "
                f"{MERGE}."
            )
    return {pattern: _number(found, pattern, 0, path, whole) for pattern in found}


def _names(values: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    found = values.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{path} gives {key} = {printable(repr(found), 60)}; it must be a list of names."
        )
    return tuple(found)


def _by_pattern(patterns: Mapping[str, float], module: str) -> float | None:
    """Return what the first pattern says that ends at a module's name, as PEFT looks it up."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return None
