"""What config.json would say of a model, from the metadata of a GGUF file.

llama.cpp stores sizes under its own names, and the scaling of Llama 3's RoPE as a tensor: what each
frequency is divided by. Metadata that changes what a model computes, and that is not understood
here, is refused: it would be lost without a word.

    config_of(header, path)["hidden_size"]
    rope_scaling(factors, theta)          # {"rope_type": "llama3", ...}
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_coreml.errors import CheckpointError, UnsupportedError

ARCHITECTURE = "llama"
_ADVICE = "Put the model's config.json beside the file, or give the safetensors it was made from."

_NEEDED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
}
_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
# Where llama.cpp's name is not that of transformers.
_MODEL_TYPES = {
    "command-r": "cohere",
    "deepseek2": "deepseek_v2",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "gptneox": "gpt_neox",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "qwen35": "qwen3_5_text",
}
_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
# Read below, or of no effect on what is computed.
_OTHERS = (
    *_HEAD_SIZES,
    "vocab_size",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "expert_count",
    "expert_used_count",
    "attention.causal",
    "tensor_data_layout",
)
_TOKENS = {
    "bos_token_id": ("bos_token_id",),
    # A text ends with a turn too, as llama.cpp has it.
    "eos_token_id": ("eos_token_id", "eot_token_id", "eom_token_id"),
    "pad_token_id": ("padding_token_id",),
}
# What Llama 3.1 and 3.2 have, beside the factor.
_LOW, _HIGH, _TRAINED = 1.0, 4.0, 8192
_TOLERANCE = 1e-4


def config_of(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, Any]:
    """Return the config.json of a file that has none beside it.

    Args:
        metadata: Of the file.
        shapes: Of its tensors, by their names there.
        path: The file.

    Returns:
        Sizes, special tokens and RoPE without the scaling that a tensor holds. Of an architecture
        that is not Llama's the `model_type` and a few sizes, for its family to be found missing.

    Raises:
        CheckpointError: a size is missing, no number, or not that of the tensors.
        UnsupportedError: metadata that is not understood.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path} does not name its general.architecture. {_ADVICE}")
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    if architecture != ARCHITECTURE or own.get("expert_count"):
        return _of_another(architecture, own)
    _refuse_unknown(own, path)
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for key, name in (_NEEDED | _OPTIONAL).items():
        if key in own:
            config[name] = _number(own, key, path)
        elif key in _NEEDED:
            raise CheckpointError(f"{path} does not give {ARCHITECTURE}.{key}. {_ADVICE}")
    config |= _head_size(own, path)
    config["rope_parameters"] = _rope(own, path)
    config["vocab_size"] = _vocabulary(own, shapes, path)
    _hold_against(config, shapes, path)
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if "sliding_window" in config:  # llama.cpp has one architecture for both
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return {**config, **special_tokens(metadata)}


def _of_another(architecture: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model_type of a model that is not read, and the sizes by which it is told."""
    known = "mixtral" if architecture == ARCHITECTURE else architecture
    sizes = {
        name: own[key]
        for key, name in (_NEEDED | _OPTIONAL | _EXPERTS).items()
        if isinstance(own.get(key), int)
    }
    return {"model_type": _MODEL_TYPES.get(known, known), **sizes}


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids that begin, end and pad a text, as config.json names them."""
    found: dict[str, Any] = {}
    for name, keys in _TOKENS.items():
        ids = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
        known = list(dict.fromkeys(each for each in ids if isinstance(each, int)))
        if known:
            found[name] = known[0] if len(known) == 1 else known
    return found


def with_scaling(config: dict[str, Any], factors: np.ndarray[Any, Any] | None, path: Path) -> None:
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
                f"{factors.max():g}, which are not those of a scaling that is known. {_ADVICE}"
            )
        config["rope_parameters"] = {"rope_theta": theta, **found}
    elif found is None or not _same(rope, found, factors, theta):
        raise UnsupportedError(
            f"'rope_freqs.weight' in {path} scales RoPE by other factors than config.json does "
            f"({kind}). Put the config.json of this model beside the file."
        )


def rope_scaling(factors: np.ndarray[Any, Any], theta: float) -> dict[str, Any] | None:
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


def _same(
    rope: Mapping[str, Any], found: dict[str, Any], factors: np.ndarray[Any, Any], theta: float
) -> bool:
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


def _gives(parameters: Mapping[str, Any], factors: np.ndarray[Any, Any], theta: float) -> bool:
    """Say whether a scaling gives these factors."""
    waves = _wavelengths(len(factors), theta)
    factor, positions = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if not high > low:
        return False
    share = np.clip((positions / waves - low) / (high - low), 0, 1)
    return bool(np.allclose(1 / ((1 - share) / factor + share), factors, rtol=_TOLERANCE, atol=0))


def _wavelengths(count: int, theta: float) -> np.ndarray[Any, Any]:
    return 2 * math.pi * theta ** (np.arange(count) / count)


def _refuse_unknown(own: Collection[str], path: Path) -> None:
    for key in own:
        if key not in _NEEDED and key not in _OPTIONAL and key not in _OTHERS:
            raise UnsupportedError(
                f"{path} gives {ARCHITECTURE}.{key}, which is not understood and may change what "
                f"the model computes. {_ADVICE}"
            )


def _number(own: Mapping[str, Any], key: str, path: Path) -> int | float:
    value = own[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = "one for each layer" if isinstance(value, dict) else repr(value)
        raise CheckpointError(
            f"{path} gives {ARCHITECTURE}.{key} = {shown}; it must be one number. {_ADVICE}"
        )
    return value


def _head_size(own: Mapping[str, Any], path: Path) -> dict[str, Any]:
    sizes = {key: _number(own, key, path) for key in _HEAD_SIZES if key in own}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{key} = {size}" for key, size in sizes.items())
        raise UnsupportedError(
            f"{path} gives {shown}: heads whose parts differ in size, or that RoPE turns in part, "
            "are not computed. Give another model."
        )
    return {"head_dim": next(iter(sizes.values()))} if sizes else {}


def _vocabulary(
    own: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> int | float:
    if "token_embd.weight" in shapes:
        return shapes["token_embd.weight"][0]
    if "vocab_size" in own:
        return _number(own, "vocab_size", path)
    raise CheckpointError(f"{path} has no token_embd.weight. Download it again.")


def _hold_against(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Refuse sizes that the first block does not have: they may be of any magnitude."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    keys = config.get("num_key_value_heads", heads)
    dim = config.get("head_dim", hidden // heads if heads else 0)
    promised = {
        "token_embd": (config["vocab_size"], hidden),
        "blk.0.attn_q": (heads * dim, hidden),
        "blk.0.attn_k": (keys * dim, hidden),
        "blk.0.ffn_up": (config["intermediate_size"], hidden),
    }
    for name, shape in promised.items():
        found = shapes.get(f"{name}.weight")
        if found != shape:
            shown = "absent" if found is None else list(found)
            raise CheckpointError(
                f"'{name}.weight' in {path} is {shown}, and its metadata promises {list(shape)}. "
                "Download the file again."
            )
    layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    if len(layers) != config["num_hidden_layers"]:
        raise CheckpointError(
            f"{path} promises {config['num_hidden_layers']} blocks and holds {len(layers)}. "
            "Download the file again."
        )


def _rope(own: Mapping[str, Any], path: Path) -> dict[str, Any]:
    theta = _number(own, "rope.freq_base", path) if "rope.freq_base" in own else 10000.0
    kind = own.get("rope.scaling.type", "none")
    factor = next(
        (own[key] for key in ("rope.scaling.factor", "rope.scale_linear") if key in own), 1
    )
    if "rope.scale_linear" in own and "rope.scaling.type" not in own and factor != 1:
        kind = "linear"
    if kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    found: dict[str, Any] = {"rope_theta": theta, "rope_type": kind, "factor": factor}
    trained = own.get("rope.scaling.original_context_length")
    if trained is not None:
        found["original_max_position_embeddings"] = trained
    return found
