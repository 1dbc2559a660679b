"""Configurations of torchao's `quantize_` as the text of `--scheme`; loaded where one is given.

    spelled(IntxWeightOnlyConfig(torch.int4, PerGroup(64)))          # 'int4-group:group64'
    spelled(CodebookWeightOnlyConfig(torch.uint3, [16, -1]))         # 'codebook:3:rows16'

A configuration names a format and a way to choose its numbers. The format is taken exactly, the
way is this project's own: how scales are chosen (`intx_choose_qparams_algorithm`, and rounding by
`SYMMETRIC` or `SYMMETRIC_NO_CLIPPING_ERR`) makes no difference here.
"""

from __future__ import annotations

from typing import Any

import torch
from torchao.core.config import AOBaseConfig
from torchao.prototype.quantization.codebook_coreml import CodebookWeightOnlyConfig
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType

from llm_coreml.config.setting import brief
from llm_coreml.errors import ConfigError, UnsupportedError

_DEFAULT = "_default"
_REGULAR = "re:"
# Integers of these bits have an operation of their own; the others are looked up in tables, which
# come with scales of groups.
_NATIVE, _LOOKED_UP = (4, 8), (2, 3, 6)
_CODEBOOK = (1, 2, 3, 4, 6, 8)
_SCALES = (None, torch.float16, torch.float32)


def spelled(value: object) -> str | dict[str, Any]:
    """Return the text of one format, or patterns in their order with what they stand for.

    Raises:
        ConfigError: it is no configuration of weights.
        UnsupportedError: Core ML has no such format.
    """
    if isinstance(value, IntxWeightOnlyConfig):
        return _integers(value)
    if isinstance(value, CodebookWeightOnlyConfig):
        return _codebook(value)
    if isinstance(value, FqnToConfig):
        return _by_name(value)
    if isinstance(value, AOBaseConfig):
        raise UnsupportedError(
            f"{type(value).__name__} has no form in Core ML; give IntxWeightOnlyConfig or "
            "CodebookWeightOnlyConfig."
        )
    raise ConfigError(
        f"A weight format is {brief(value)}; give a text, or torchao's IntxWeightOnlyConfig or "
        "CodebookWeightOnlyConfig."
    )


def _integers(config: IntxWeightOnlyConfig) -> str:
    bits = _bits(config.weight_dtype)
    if config.scale_dtype not in _SCALES:
        raise UnsupportedError(
            f"IntxWeightOnlyConfig has scales of {config.scale_dtype}, which Core ML cannot hold; "
            "leave scale_dtype out."
        )
    zero = "zero-int" if config.mapping_type is MappingType.ASYMMETRIC else "zero-none"
    if isinstance(config.granularity, PerGroup):
        if bits not in (*_NATIVE, *_LOOKED_UP):
            raise _no_integers(bits, "2, 3, 4, 6 and 8 bits in groups")
        return f"int{bits}-group:group{config.granularity.group_size}:{zero}"
    if bits not in _NATIVE:
        instead = "PerGroup" if bits in _LOOKED_UP else "int4 or int8"
        raise _no_integers(bits, f"4 and 8 bits with a scale for each row; use {instead}")
    return f"int{bits}-channel:{zero}"


def _no_integers(bits: int, allowed: str) -> UnsupportedError:
    return UnsupportedError(
        f"IntxWeightOnlyConfig asks for int{bits}; Core ML holds integers of {allowed}, or a "
        "CodebookWeightOnlyConfig of 1, 2, 3, 4, 6 or 8 bits."
    )


def _codebook(config: CodebookWeightOnlyConfig) -> str:
    bits = _bits(config.dtype)
    if bits not in _CODEBOOK:
        raise UnsupportedError(
            f"CodebookWeightOnlyConfig asks for {config.dtype}; Core ML holds codes of 1, 2, 3, 4, "
            "6 and 8 bits."
        )
    if len(config.block_size) != 2 or any(size == 0 or size < -1 for size in config.block_size):
        raise ConfigError(
            f"CodebookWeightOnlyConfig has the block_size {config.block_size}; give rows and "
            "columns, -1 for all of them."
        )
    sizes = zip(("rows", "columns"), config.block_size, strict=True)
    block = [f"{what}{size}" for what, size in sizes if size != -1]
    return ":".join([f"codebook:{bits}", *(block or ["whole"])])


def _by_name(config: FqnToConfig) -> dict[str, Any]:
    """Return the configurations by pattern: exact names come first in torchao, the rest last."""
    given = dict(config.fqn_to_config)
    for name in given:
        if name.startswith(_REGULAR):
            raise UnsupportedError(
                f"FqnToConfig has the regular expression {brief(name)}; give a mapping of patterns "
                "such as 'layers.0.*' instead."
            )
    last = {"*": given.pop(_DEFAULT)} if _DEFAULT in given else {}
    return {name.removesuffix(".weight"): found for name, found in given.items()} | last


def _bits(dtype: torch.dtype) -> int:
    """Return the bits of torch.int4, torch.uint3 and their like, 0 for other types."""
    name = str(dtype).removeprefix("torch.").removeprefix("u")
    digits = name.removeprefix("int")
    return int(digits) if name.startswith("int") and digits.isdecimal() else 0
