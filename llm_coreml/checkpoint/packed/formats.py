"""Which format a config.json says its matrices are stored in.

find_formats(config, "config.json")      # () where they are not quantized
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llm_coreml.checkpoint.packed.awq_format import AWQ
from llm_coreml.checkpoint.packed.bitnet_format import BitNet
from llm_coreml.checkpoint.packed.bitsandbytes_format import BitsAndBytes, BitsAndBytes8
from llm_coreml.checkpoint.packed.blocks import BLOCKS
from llm_coreml.checkpoint.packed.compressed_format import PackedWords, PlainBytes
from llm_coreml.checkpoint.packed.fp8_format import FP8
from llm_coreml.checkpoint.packed.gptq_format import BITS, GPTQ
from llm_coreml.checkpoint.packed.hqq_format import HQQ
from llm_coreml.checkpoint.packed.mlx_format import MLX
from llm_coreml.checkpoint.packed.mxfp4_format import COMPRESSED_MXFP4, MLX_MXFP4
from llm_coreml.checkpoint.packed.parts import PackedFormat
from llm_coreml.checkpoint.packed.torchao_format import TorchAO
from llm_coreml.errors import CheckpointError, UnsupportedError

Formats = tuple[PackedFormat, ...]

# Those that make an IntxUnpackedToInt8Tensor, and those that hold others.
_TORCHAO = {
    "IntxWeightOnlyConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "FqnToConfig",
    "ModuleFqnToConfig",
}
_MLX_BITS = (2, 3, 4, 6, 8)
_KEYS = ("quantization_config", "compression_config", "quantization")


def find_formats(config: Mapping[str, Any], where: str) -> Formats:
    """Return the formats of a checkpoint's quantized matrices, none if it has none.

    Args:
        config: The parsed config.json.
        where: What to call it.

    Raises:
        CheckpointError: the settings of a known format are missing or senseless.
        UnsupportedError: the format, or an option of it, cannot be read.
    """
    for key in _KEYS:
        settings = config.get(key)
        if not settings:
            continue
        if not isinstance(settings, Mapping):
            raise CheckpointError(f"{where} gives {key} = {settings!r}; it must be an object.")
        method = str(settings.get("quant_method") or _implied(settings)).lower()
        if method not in _READERS:
            raise _refusal(where, f"{key} {method or 'without a quant_method'}")
        return _READERS[method](settings, where)
    return ()


def names_quantization(config: Mapping[str, Any]) -> bool:
    """Say whether a configuration speaks of quantized weights, in whatever way."""
    return any(config.get(key) for key in _KEYS)


def _implied(settings: Mapping[str, Any]) -> str:
    """Return the method of settings that name none: MLX gives its two numbers and no name."""
    return "mlx" if {"bits", "group_size"} <= settings.keys() else ""


def _gptq(settings: Mapping[str, Any], where: str) -> Formats:
    bits = _choice(settings, "bits", BITS, where)
    version = str(settings.get("checkpoint_format") or "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise _refusal(where, f"GPTQ weights in the form '{version}'")
    bias, group_size = 1 if version == "gptq" else 0, _group_size(settings, where)
    # Rules by module, in regular expressions that nobody vouches for: the tensors say it, too.
    if settings.get("dynamic"):
        return (GPTQ(None, None, bias),)
    return (GPTQ(bits, group_size, bias),)


def _awq(settings: Mapping[str, Any], where: str) -> Formats:
    settings = {
        "bits": settings.get("w_bit"),
        "group_size": settings.get("q_group_size"),
        **settings,
    }  # the names of the tool's own file first
    _choice(settings, "bits", (4,), where)
    version = str(settings.get("version") or "gemm").lower()
    if version != "gemm":
        raise _refusal(where, f"AWQ weights in the form '{version}'")
    return (AWQ(_group_size(settings, where)),)


def _auto_round(settings: Mapping[str, Any], where: str) -> Formats:
    packing = str(settings.get("packing_format") or "").rpartition(":")[2]
    if packing == "auto_awq":
        return _awq(settings, where)
    if packing != "auto_gptq":
        raise _refusal(where, f"AutoRound weights in the form '{packing or 'unnamed'}'")
    # Modules may have settings of their own, which the tensors say, too.
    return (GPTQ(None, None, bias=1),)


def _compressed(settings: Mapping[str, Any], where: str) -> Formats:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where} names no config_groups of compressed-tensors.")
    sparsity = settings.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense"):
        raise _refusal(where, "sparse weights")
    sizes: set[int] = set()
    blocks: set[tuple[int, int]] = set()
    mxfp4 = False
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        kind = weights.get("type", "int") if isinstance(weights, Mapping) else None
        form = group.get("format") or settings.get("format") if isinstance(group, Mapping) else None
        if kind == "float" and form == "mxfp4-pack-quantized":
            mxfp4 = True
            continue
        if isinstance(weights, Mapping) and (kind, weights.get("num_bits")) == ("float", 8):
            blocks.add(_block(weights.get("block_structure"), where))
            continue
        if not isinstance(weights, Mapping) or kind != "int":
            raise _refusal(
                where,
                f"compressed-tensors whose weights are {form or kind}, not integers, FP8 or MXFP4",
            )
        _choice(weights, "num_bits", (4, 8), where)
        sizes.add(_group_size({"group_size": weights.get("group_size") or -1}, where))
    # FP8 first, which looks at types: names alone do not part it from int8.
    fp8 = [FP8("weight_scale", block) for block in sorted(blocks)]
    words = [PackedWords(frozenset(sizes)), PlainBytes(frozenset(sizes))]
    return (*fp8, *words, *([COMPRESSED_MXFP4] if mxfp4 else []))


def _bitnet(settings: Mapping[str, Any], where: str) -> Formats:
    if settings.get("quantization_mode", "offline") != "offline":
        raise UnsupportedError(
            f"{where} has BitNet weights that its code rounds each time (quantization_mode "
            f"{settings['quantization_mode']!r}). Give the checkpoint whose weights are rounded "
            "(offline), as microsoft/bitnet-b1.58-2B-4T has them."
        )
    if settings.get("use_rms_norm"):
        raise _refusal(where, "BitNet weights with a norm of their own (use_rms_norm)")
    return (BitNet(divides=settings.get("linear_class", "bitlinear") == "bitlinear"),)


def _bitsandbytes(settings: Mapping[str, Any], where: str) -> Formats:
    return BitsAndBytes("nf4"), BitsAndBytes("fp4"), BitsAndBytes8()


def _fp8(settings: Mapping[str, Any], where: str) -> Formats:
    block = _block(settings.get("weight_block_size"), where)
    return FP8("weight_scale_inv", block), FP8("weight_scale", block)


def _modelopt(settings: Mapping[str, Any], where: str) -> Formats:
    own = settings.get("quantization")  # as the tool's own file has it
    kind = (own if isinstance(own, Mapping) else settings).get("quant_algo")
    if kind != "FP8":
        raise _refusal(where, f"ModelOpt weights of {kind}")
    return (FP8("weight_scale", (128, 128)),)


def _block(value: object, where: str) -> tuple[int, int]:
    """Return rows and columns of a block of FP8; those of DeepSeek if none are named."""
    if value is None:
        return 128, 128
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_size, value)):
        return int(value[0]), int(value[1])
    raise CheckpointError(
        f"{where} gives {value!r} as the blocks of its quantized weights; it must be two whole "
        "numbers of at least 1. Download the checkpoint again."
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _mlx(settings: Mapping[str, Any], where: str) -> Formats:
    mode = settings.get("mode") or "affine"
    if mode == "mxfp4":
        if any(isinstance(own, Mapping) for own in settings.values()):
            raise _refusal(where, "MLX weights of mode 'mxfp4' with other settings for modules")
        return (MLX_MXFP4,)
    if mode != "affine":
        raise _refusal(where, f"MLX weights in the mode '{mode}'")
    numbers = (_choice(settings, "bits", _MLX_BITS, where), _group_size(settings, where))
    others = {}
    for module, own in settings.items():
        if isinstance(own, Mapping):
            both = {**settings, **own}
            others[module] = (_choice(both, "bits", _MLX_BITS, where), _group_size(both, where))
    return (MLX(*numbers, others),)


def _hqq(settings: Mapping[str, Any], where: str) -> Formats:
    return (HQQ(),)


def _torchao(settings: Mapping[str, Any], where: str) -> Formats:
    kinds = {kind for kind in _types(settings.get("quant_type")) if kind.endswith("Config")}
    if not kinds or not kinds <= _TORCHAO:
        raise _refusal(where, f"torchao weights of {', '.join(sorted(kinds)) or 'an unnamed kind'}")
    return (TorchAO(),)


def _gguf(settings: Mapping[str, Any], where: str) -> Formats:
    return tuple(BLOCKS.values())


def _types(value: object) -> Iterator[str]:
    """Yield the types that are named anywhere in torchao's JSON."""
    if isinstance(value, Mapping):
        if isinstance(value.get("_type"), str):
            yield value["_type"]
        for item in value.values():
            yield from _types(item)


_READERS: dict[str, Callable[[Mapping[str, Any], str], Formats]] = {
    "gguf": _gguf,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "awq": _awq,
    "bitnet": _bitnet,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "fbgemm_fp8": _fp8,
    "fp8": _fp8,
    "hqq": _hqq,
    "intel/auto-round": _auto_round,
    "mlx": _mlx,
    "modelopt": _modelopt,
    "torchao": _torchao,
}


def _choice(settings: Mapping[str, Any], key: str, known: tuple[int, ...], where: str) -> int:
    value = settings.get(key)
    if value not in known or isinstance(value, bool):
        raise UnsupportedError(
            f"{where} gives {key} = {value!r} for its quantized weights; "
            f"{', '.join(map(str, known))} can be read. Give the unquantized checkpoint."
        )
    return int(value)


def _group_size(settings: Mapping[str, Any], where: str) -> int:
    value = settings.get("group_size")
    if isinstance(value, int) and not isinstance(value, bool) and (value == -1 or value > 0):
        return value
    raise CheckpointError(
        f"{where} gives group_size = {value!r} for its quantized weights; it must be a whole "
        "number of at least 1, or -1. Download the checkpoint again."
    )


def _refusal(where: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where} has {what}, which cannot be read. Read are {', '.join(sorted(_READERS))}; else "
        "give the unquantized checkpoint that it was made from."
    )
