"""What llama.cpp's converter makes of a model of `transformers`, by its rules, of any family.

Names of tensors are those of the `gguf` package, so that they are not ours on both sides. The rules
are those of the classes in llama.cpp's `conversion` folder, a line or two of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Array = np.ndarray[Any, Any]
Writer = gguf.GGUFWriter
Rows = Callable[[Array, Any], Array]


def paired(values: Array, heads: int) -> Array:
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _llama(name: str, values: Array, config: Any) -> Array:
    if ".q_proj." in name:
        return paired(values, config.num_attention_heads)
    if ".k_proj." in name:
        return paired(values, config.num_key_value_heads)
    return values


def _plus_one(name: str, values: Array, config: Any) -> Array:
    return values + 1 if name.endswith("norm.weight") else values


def _head_by_head(name: str, values: Array, config: Any) -> Array:
    if "query_key_value" not in name:
        return values
    each = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
    return each.swapaxes(0, 1).reshape(values.shape)


def _by_groups(name: str, values: Array, config: Any) -> Array:
    if "query_key_value" not in name:
        return values
    heads = config.num_attention_heads
    keys = key_heads("falcon", config)
    rest = values.shape[1:]
    each = values.reshape(keys, heads // keys + 2, -1, *rest)
    parts = [each[:, :-2], each[:, -2:-1], each[:, -1:]]
    return np.concatenate([part.reshape(-1, *rest) for part in parts])


_TURNED = ("c_attn", "c_proj", "c_fc")


def _transposed(name: str, values: Array, config: Any) -> Array:
    return values.T if name.endswith(tuple(f"{part}.weight" for part in _TURNED)) else values


_VALUES: dict[str, Callable[[str, Array, Any], Array]] = {
    **dict.fromkeys(("arcee", "granite", "llama", "mistral3", "olmo", "smollm3"), _llama),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "nemotron"), _plus_one),
    **dict.fromkeys(("bloom", "gptneox"), _head_by_head),
    "gpt2": _transposed,
    "falcon": _by_groups,
}


def _share(writer: Writer, config: Any) -> None:
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * head_dim(config)))


def head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _whole(writer: Writer, config: Any) -> None:
    writer.add_rope_dimension_count(head_dim(config))


def _granite(writer: Writer, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _window(writer: Writer, config: Any) -> None:
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)


def _caps(writer: Writer, config: Any) -> None:
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _window(writer, config)


def _pattern(writer: Writer, config: Any) -> None:
    _window(writer, config)
    if config.sliding_window is not None:
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_sliding_window_pattern(kinds)


def _cohere(writer: Writer, config: Any) -> None:
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if getattr(config, "sliding_window", None) is not None:
        _window(writer, config)


def _phi3(writer: Writer, config: Any) -> None:
    _share(writer, config)
    writer.add_sliding_window(config.sliding_window or 0)
    trained = config.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(trained)
    if config.rope_parameters["rope_type"] == "longrope":
        scale = config.max_position_embeddings / trained
        factor = math.sqrt(1 + math.log(scale) / math.log(trained))
        writer.add_rope_scaling_attn_factors(factor)
        for name in ("long", "short"):
            factors = np.array(config.rope_parameters[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)


def _mistral3(writer: Writer, config: Any) -> None:
    _whole(writer, config)
    rope = config.rope_parameters
    writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _stablelm(writer: Writer, config: Any) -> None:
    _share(writer, config)
    writer.add_parallel_residual(config.use_parallel_residual)


def _olmo(writer: Writer, config: Any) -> None:
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(config.clip_qkv)


def _hunyuan(writer: Writer, config: Any) -> None:
    rope, dim = config.rope_parameters, head_dim(config)
    if rope["rope_type"] == "dynamic":
        base = rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2))
        writer.add_rope_freq_base(base)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1)


def _gemma4(writer: Writer, config: Any) -> None:
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    layers = [config.per_layer_config[index] for index in range(len(kinds))]
    whole, local = layers[kinds.index(False)], layers[kinds.index(True)]
    _caps(writer, config)
    writer.add_sliding_window_pattern(kinds)
    shared = config.num_kv_shared_layers or 0
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(whole.head_dim)
    writer.add_key_length_swa(local.head_dim)
    writer.add_value_length_swa(local.head_dim)
    writer.add_rope_dimension_count_swa(local.head_dim)
    if config.use_double_wide_mlp:
        inner, count = config.intermediate_size, len(kinds) - shared
        writer.add_feed_forward_length(count * [inner] + shared * [2 * inner])
    if whole.num_key_value_heads != local.num_key_value_heads:
        writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    rope = config.rope_parameters
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    pairs = whole.head_dim // 2
    turned = int(pairs * rope["full_attention"]["partial_rotary_factor"])
    factors = np.array(turned * [1.0] + (pairs - turned) * [1e30], np.float32)
    writer.add_tensor("rope_freqs.weight", factors)


_METADATA: dict[str, Callable[[Writer, Any], None]] = {
    "apertus": _whole,
    "arcee": _whole,
    "chatglm": _share,
    "cohere2": _cohere,
    "command-r": _cohere,
    "exaone4": _pattern,
    "gemma2": _caps,
    "gemma3": _caps,
    "gemma4": _gemma4,
    "glm4": _share,
    "gptneox": _stablelm,
    "granite": lambda writer, config: (_whole(writer, config), _granite(writer, config))[0],
    "hunyuan-dense": _hunyuan,
    "llama": _whole,
    "mistral3": _mistral3,
    "nemotron": _share,
    "olmo": _olmo,
    "olmo2": lambda writer, config: (
        _pattern(writer, config) if hasattr(config, "sliding_window") else None
    ),
    "phi2": _share,
    "phi3": _phi3,
    "smollm3": _whole,
    "stablelm": _stablelm,
}
_EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
# Classes that write no width of a head, as `head_dim` is no setting of theirs.
_NO_HEAD = (
    *("bloom", "chatglm", "falcon", "gemma4", "gpt2", "gptneox", "granite", "olmo", "phi2"),
    *("stablelm", "starcoder", "starcoder2"),
)
# Whose feed-forward layers are four times as wide as the residual stream, or told otherwise.
_NO_INNER = ("bloom", "falcon", "gpt2", "starcoder")


def key_heads(architecture: str, config: Any) -> int:
    """Return how many heads of keys there are."""
    if architecture == "starcoder":
        return 1
    if architecture == "gemma4":
        return int(config.per_layer_config[0].num_key_value_heads)
    if architecture == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else config.num_attention_heads
    names = ("num_kv_heads", "num_key_value_heads")
    found = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    return found or config.num_attention_heads


def describe(writer: Writer, architecture: str, config: Any) -> None:
    """Write the metadata of a model."""
    writer.add_block_count(config.num_hidden_layers)
    length = getattr(config, "max_position_embeddings", None)
    writer.add_context_length(length or getattr(config, "seq_length", config.hidden_size))
    writer.add_embedding_length(config.hidden_size)
    inner = None if architecture in _NO_INNER else config.intermediate_size
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture not in ("gpt2", "gptneox"):
        writer.add_head_count_kv(key_heads(architecture, config))
    if getattr(config, "rms_norm_eps", None) is not None:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name in _EPSILONS:
        if getattr(config, name, None) is not None:
            writer.add_layer_norm_eps(getattr(config, name))
    if architecture not in _NO_HEAD:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    _describe_rope(writer, config)
    _METADATA.get(architecture, lambda writer, config: None)(writer, config)


def _describe_rope(writer: Writer, config: Any) -> None:
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] != "dynamic":
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(np.arange(0, head_dim(config), 2) / head_dim(config))
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
        writer.add_tensor("rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32))
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow", 1.0))


def convert(
    path: Path, architecture: str, model: Any, kind: Kind = Kind.F32
) -> dict[str, torch.Tensor]:
    """Write a model as llama.cpp's converter does; return what it means by `transformers`' names.

    Args:
        path: The file.
        architecture: What llama.cpp calls it.
        model: A model of `transformers`, fp32.
        kind: The type of matrices whose rows are whole blocks of it; others are F32.
    """
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer, architecture, model.config)
    writer.add_token_list([str(index) for index in range(model.config.vocab_size)])
    writer.add_pad_token_id(0)
    meant = dict(_tensors(writer, architecture, model, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _tensors(
    writer: Writer, architecture: str, model: Any, kind: Kind
) -> Iterator[tuple[str, torch.Tensor]]:
    (arch,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    change = _VALUES.get(architecture, lambda name, values, config: values)
    size = gguf.GGML_QUANT_SIZES[kind][0]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if ".act_fn." in name:
            writer.kv_data[0].setdefault(
                f"xielu.{name.rpartition('.')[2]}",
                gguf.GGUFValue([], gguf.GGUFValueType.ARRAY),
            ).value.append(tensor.item())
            yield name, tensor.reshape(1)
            continue
        plain = name.removeprefix("transformer.") if architecture == "bloom" else name
        plain += ".weight" if plain.endswith(".layer_scalar") else ""
        stored = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        assert stored is not None, f"llama.cpp has no name for {name}"
        if architecture == "gptneox":  # as checkpoints call it, which transformers renames
            name = name.replace("lm_head", "embed_out")
        values = np.ascontiguousarray(change(name, tensor.numpy(), model.config))
        if architecture == "gpt2" and any(f".{part}." in name for part in _TURNED):
            name, tensor = ".T.".join(name.rsplit(".", 1)), torch.from_numpy(values)
        if values.ndim == 1 or values.shape[1] % size or kind == Kind.F32:
            writer.add_tensor(stored, values)
            yield name, tensor
            continue
        writer.add_tensor(stored, quants.quantize(values, kind), raw_dtype=kind)
        # A row is rounded by itself, wherever it stands.
        rounded = quants.dequantize(quants.quantize(tensor.numpy(), kind), kind)
        yield name, torch.from_numpy(rounded)


def as_theirs(meant: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what `convert` gave as `transformers` itself has it: its GPT-2 the other way round."""
    return {
        name.replace(".T.", "."): tensor.T if name.endswith(".T.weight") else tensor
        for name, tensor in meant.items()
    }


def rounded(spec: Any) -> Any:
    """Return a spec as plain data, its numbers as fp32, which is what a file holds."""
    if is_dataclass(spec):
        return {field.name: rounded(getattr(spec, field.name)) for field in fields(spec)}
    if isinstance(spec, tuple):
        return [rounded(each) for each in spec]
    return float(f"{np.float32(spec):.6g}") if isinstance(spec, float) else spec
