"""What config.json would say of a model, from the metadata of a GGUF file.

Metadata that changes what a model computes, and that is not understood here, is refused: it would
be lost without a word. What llama.cpp has in its code is in `gguf_architectures.py`.

    config_of(metadata, shapes, path)["hidden_size"]
    config_of(metadata, shapes, path)["model_type"]        # 'gemma3_text', where it says 'gemma3'
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llm_coreml.checkpoint.gguf_architectures import ARCHITECTURES, Architecture
from llm_coreml.checkpoint.gguf_layers import of_windows
from llm_coreml.checkpoint.gguf_rope import ADVICE, ROPE_KEYS, base_of, number, rope_of
from llm_coreml.errors import CheckpointError, UnsupportedError

Shapes = Mapping[str, tuple[int, ...]]

_NEEDED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}
_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
# Where the name of an architecture that is not read is not that of transformers.
_MODEL_TYPES = {
    "deepseek2": "deepseek_v2",
    "gemma3n": "gemma3n_text",
    "gpt-oss": "gpt_oss",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "qwen35": "qwen3_5_text",
}
_HEAD, _TURNED = ("attention.key_length", "attention.value_length"), "rope.dimension_count"
_PATTERN, _WINDOW = "attention.sliding_window_pattern", "attention.sliding_window"
# Read below, or of no effect on what is computed.
_OTHERS = (
    *_HEAD,
    *ROPE_KEYS,
    *_EXPERTS,
    _TURNED,
    # Of these an architecture has one, and llama.cpp passes over the other.
    *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
    "vocab_size",
    "attention.causal",
    "tensor_data_layout",
)
_TOKENS = {
    "bos_token_id": ("bos_token_id",),
    # A text ends with a turn too, as llama.cpp has it.
    "eos_token_id": ("eos_token_id", "eot_token_id", "eom_token_id"),
    "pad_token_id": ("padding_token_id",),
}
# Gemma's largest divide queries by the width that each head has of the residual stream.
_BY_STREAM = {("gemma2", 46), ("gemma3_text", 62)}


def config_of(metadata: Mapping[str, Any], shapes: Shapes, path: Path) -> dict[str, Any]:
    """Return the config.json of a file that has none beside it.

    Args:
        metadata: Of the file.
        shapes: Of its tensors, by their names there.
        path: The file.

    Returns:
        Sizes, special tokens and RoPE without the scaling that a tensor holds. Of an architecture
        that is not known the `model_type` and a few sizes, for its family to be found missing.

    Raises:
        CheckpointError: a size is missing, no number, or not that of the tensors.
        UnsupportedError: metadata that is not understood.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path} does not name its general.architecture. {ADVICE}")
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    known = ARCHITECTURES.get(architecture)
    if known is None or own.get("expert_count"):
        return _of_another(architecture, own)
    told: dict[str, Any] = {}
    block = 0
    if known.model_type == "gemma4_text":
        own, told, block = of_windows(own, shapes, path)
    _refuse_unknown(architecture, known, own, path)
    config: dict[str, Any] = {"model_type": known.model_type, **known.fixed}
    for key, name in (_NEEDED | _OPTIONAL | dict(known.numbers)).items():
        if key in own and name:
            config[name] = own[key] if isinstance(own[key], bool) else number(own, key, path)
        elif key in _NEEDED:
            raise CheckpointError(f"{path} does not give {architecture}.{key}. {ADVICE}")
    config["vocab_size"] = _vocabulary(own, shapes, path)
    config |= _heads(known, own, config, path)
    _hold_against(known, config, shapes, path, block)
    config |= told | _parts_in(known, shapes)
    config |= _windows(known, own, config)
    config |= {"rope_parameters": _rope(own, config, path)} if known.rotary else {}
    config |= _of_its_own(known, own, config, shapes)
    config = {known.sizes.get(name, name): value for name, value in config.items()}
    return {**config, **_class(config["model_type"]), **special_tokens(metadata)}


def _class(model_type: str) -> dict[str, Any]:
    """Return the class that transformers has for a model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return {"architectures": [name]} if isinstance(name, str) else {}


def _of_another(architecture: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model_type of a model that is not read, and the sizes by which it is told."""
    if architecture == "gemma4":
        return {"model_type": "gemma4_text", "enable_moe_block": True}
    known = "mixtral" if architecture == "llama" else architecture
    usual = {"attention.sliding_window": "sliding_window"}
    sizes = {
        name: own[key]
        for key, name in (_NEEDED | _OPTIONAL | _EXPERTS | usual).items()
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


def _refuse_unknown(
    architecture: str, known: Architecture, own: Collection[str], path: Path
) -> None:
    understood = {*_NEEDED, *_OPTIONAL, *_OTHERS, *known.numbers}
    if _WINDOW in known.numbers:
        understood.add(_PATTERN)
    for key in own:
        if key not in understood:
            raise UnsupportedError(
                f"{path} gives {architecture}.{key}, which is not understood and may change what "
                f"the model computes. {ADVICE}"
            )


def _heads(
    known: Architecture, own: Mapping[str, Any], config: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Return the width of a head, where it is told, and how much of it is rotated."""
    whole = (*_HEAD, *([] if known.share else [_TURNED]))
    sizes = {key: number(own, key, path) for key in whole if key in own}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{key} = {size}" for key, size in sizes.items())
        raise UnsupportedError(
            f"{path} gives {shown}: heads whose parts differ in size, or that RoPE turns in part, "
            "are not computed of this architecture. Give another model."
        )
    found: dict[str, Any] = {"head_dim": next(iter(sizes.values()))} if sizes else {}
    if known.share and _TURNED in own:
        width = found.get("head_dim", _width(config))
        found[known.share] = number(own, _TURNED, path) / width if width else 1.0
    return found


def _width(config: Mapping[str, Any]) -> int:
    """Return how much of the residual stream each head has; 0 without heads."""
    heads = config["num_attention_heads"]
    return int(config["hidden_size"]) // int(heads) if heads else 0


def _vocabulary(own: Mapping[str, Any], shapes: Shapes, path: Path) -> int | float:
    if "token_embd.weight" in shapes:
        return shapes["token_embd.weight"][0]
    if "vocab_size" in own:
        return number(own, "vocab_size", path)
    raise CheckpointError(f"{path} has no token_embd.weight. Download it again.")


def _hold_against(
    known: Architecture, config: Mapping[str, Any], shapes: Shapes, path: Path, block: int
) -> None:
    """Refuse sizes that a block does not have, usually the first: they may be of any magnitude."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    keys = config.get("num_key_value_heads", config.get("num_kv_heads", heads))
    dim = config.get("head_dim", _width(config))
    inner = config["intermediate_size"] * (2 if known.wide_up else 1)
    promised = {"token_embd": (config["vocab_size"], hidden)}
    if f"blk.{block}.attn_qkv.weight" in shapes:
        promised[f"blk.{block}.attn_qkv"] = ((heads + 2 * keys) * dim, hidden)
    else:
        promised[f"blk.{block}.attn_q"] = (heads * dim, hidden)
        promised[f"blk.{block}.attn_k"] = (keys * dim, hidden)
    promised[f"blk.{block}.ffn_up"] = (inner, hidden)
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


def _parts_in(known: Architecture, shapes: Shapes) -> dict[str, Any]:
    """Return what the tensors say: which biases there are, and whether the head is the table."""
    attention, output, others = known.biases
    found: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in shapes}
    queries = ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias")
    kinds = ((attention, queries), (output, ("blk.0.attn_output.bias",)))
    for name, tensors in (*kinds, (others, ("blk.0.ffn_up.bias",))):
        if name:
            found[name] = any(tensor in shapes for tensor in tensors)
    return found


def _windows(
    known: Architecture, own: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return which layers have the window, and which have no rotary embedding."""
    count = int(config["num_hidden_layers"])
    found: dict[str, Any] = {}
    if known.no_rope is not None:
        turned = [int((index + 1) % known.no_rope != 0) for index in range(count)]
        found["no_rope_layers"] = turned
    if not config.get("sliding_window"):
        return {**found, "sliding_window": None} if "sliding_window" in config else found
    told = own.get(_PATTERN)
    values = told.get("values") if isinstance(told, Mapping) else None
    every = told if isinstance(told, int) and not isinstance(told, bool) else known.pattern
    if values is None and every:
        values = [(index + 1) % every != 0 for index in range(count)]
    if values is not None:
        names = ("full_attention", "sliding_attention")
        found["layer_types"] = [names[bool(value)] for value in values]
    return found


def _rope(own: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the rotary tables: layers with a window have one of their own in Gemma 3 and 4."""
    whole = rope_of(own, path)
    if config["model_type"] not in ("gemma3_text", "gemma4_text"):
        return whole
    if config["model_type"] == "gemma4_text":
        # A tensor tells of the share.
        whole = {**whole, "rope_type": "proportional", "partial_rotary_factor": 1.0}
    local = {"rope_type": "default", "rope_theta": base_of(own, path, of_windows=True)}
    return {"full_attention": whole, "sliding_attention": local}


def _of_its_own(
    known: Architecture, own: Mapping[str, Any], config: dict[str, Any], shapes: Shapes
) -> dict[str, Any]:
    """Return what single architectures have."""
    kind, layers = known.model_type, config["num_hidden_layers"]
    if kind == "llama" and "sliding_window" in config:
        return {"model_type": "mistral"}  # llama.cpp has one architecture for both
    if kind == "olmo2" and config.get("sliding_window"):
        return {"model_type": "olmo3"}
    if kind in ("gemma2", "gemma3_text"):
        by_stream = (kind, layers) in _BY_STREAM
        return {"query_pre_attn_scalar": _width(config) if by_stream else config["head_dim"]}
    if kind == "glm" and "head_dim" not in config:
        return {"head_dim": _width(config)}
    if kind == "cohere":
        return {"use_qk_norm": "blk.0.attn_q_norm.weight" in shapes}
    if kind == "falcon":
        both = "blk.0.attn_norm_2.weight" in shapes
        several = config["num_kv_heads"] not in (1, config["num_attention_heads"])
        new = both or several
        own = {"multi_query": config["num_kv_heads"] == 1, "new_decoder_architecture": new}
        own |= {"ffn_hidden_size": config["intermediate_size"]}
        return own | ({"num_ln_in_parallel_attn": 2 if both else 1} if new else {})
    if kind == "ministral3":
        rope = config["rope_parameters"]
        rope["llama_4_scaling_beta"] = own.get("attention.temperature_scale", 0.0)
    return {}
