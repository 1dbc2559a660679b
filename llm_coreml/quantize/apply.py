"""Quantize one module's weight in place through torchao's `quantize_`.

    quantize_weight(decoder.layers[0].mlp.gate_proj, IntGroup(4, 32))

Scales and tables are rounded to fp16, the precision in which Core ML stores them, so that the
eager model is exactly the model that the artifact holds.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.quantization.codebook_coreml import CodebookWeightOnlyConfig
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from llm_coreml.quantize.schemes import Codebook, IntChannel, IntGroup, Scheme, Unquantized


@singledispatch
def torchao_config(scheme: Scheme) -> AOBaseConfig | None:
    """Return the torchao config that makes `scheme`, or None where weights stay as they are."""
    raise NotImplementedError(f"no torchao config for {type(scheme).__name__}")


@torchao_config.register
def _(scheme: IntGroup) -> AOBaseConfig:
    return IntxWeightOnlyConfig(
        weight_dtype=_int_dtype(scheme.bits), granularity=PerGroup(scheme.group_size)
    )


@torchao_config.register
def _(scheme: IntChannel) -> AOBaseConfig:
    return IntxWeightOnlyConfig(weight_dtype=_int_dtype(scheme.bits), granularity=PerAxis(0))


@torchao_config.register
def _(scheme: Codebook) -> AOBaseConfig:
    dtype = getattr(torch, f"uint{scheme.bits}")
    return CodebookWeightOnlyConfig(dtype=dtype, block_size=[scheme.rows, -1])


@torchao_config.register
def _(scheme: Unquantized) -> None:
    return None


def quantize_weight(module: nn.Module, scheme: Scheme) -> None:
    """Replace `module.weight` (float `[out, in]`) by its quantized form."""
    config = torchao_config(scheme)
    if config is None:
        return
    quantize_(module, config, filter_fn=lambda m, _: m is module)
    weight = module.get_parameter("weight")
    for name in ("scale", "codebook"):
        values = getattr(weight, name, None)
        if values is not None:
            values.copy_(values.to(torch.float16).to(values.dtype))


def _int_dtype(bits: int) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, f"int{bits}")
    return dtype
