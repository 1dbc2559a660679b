"""Codes of torchao in a live model: layers that were trained with rounded weights, or converted.

    has_codebook(module)                     # its weight and its tables are read as they lie
    weight = rounded_weight(module)          # codes, scales and zero points; None of other modules

What a layer in training computes with is what is read: each is held against the layer's own
rounding, bit by bit, and refused where torchao's conversion would give other numbers.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

from llm_coreml.checkpoint.packed.codebook_format import TABLES
from llm_coreml.errors import UnsupportedError
from llm_coreml.printable import printable

# The parts of a matrix, as torchao saves them, and where its tensor has each.
PARTS = {
    "_weight_qdata": "qdata",
    "_weight_scale": "scale",
    "_weight_zero_point": "zero_point",
}
_QUANTIZER, _, _TABLES = TABLES.partition(".")
# What a configuration says of weights that are stored so.
SETTINGS = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "IntxWeightOnlyConfig"}},
}


def has_trained_codes(module: torch.nn.Module) -> bool:
    """Say whether the weight of a module is codes, or is rounded to codes whenever it is used."""
    weight = module._parameters.get("weight")
    codes = type(weight).__name__ == "IntxUnpackedToInt8Tensor"
    return codes or (_is_in_training(module) and not has_codebook(module))


def has_codebook(module: torch.nn.Module) -> bool:
    """Say whether the weight of a module is rounded to entries of tables whenever it is used."""
    return _is_in_training(module) and _TABLES in module.get_submodule(_QUANTIZER)._buffers


def idle_codebook(module: torch.nn.Module) -> str | None:
    """Return the name of a child that has tables which are switched off, None if there is none."""
    child = module._modules.get(_QUANTIZER)
    idle = child is not None and _TABLES in child._buffers and not _is_in_training(module)
    return _QUANTIZER if idle else None


def _is_in_training(module: torch.nn.Module) -> bool:
    found = sys.modules.get("torchao.quantization.qat.linear")
    if found is None or not isinstance(module, found.FakeQuantizedLinear):
        return False
    quantizer = module.weight_fake_quantizer
    return quantizer is not None and getattr(quantizer, "enabled", True)


def has_rounded_inputs(module: torch.nn.Module) -> bool:
    """Say whether a module also rounds what it reads, which no export does."""
    if not _is_in_training(module):
        held: Any = module._parameters.get("weight")
        return getattr(held, "activation_quantization", None) is not None
    return getattr(module, "activation_fake_quantizer", None) is not None


def rounded_weight(module: Any, path: str) -> Any:
    """Return torchao's tensor of a module's codes: `qdata`, `scale` and `zero_point`.

    Args:
        module: One with `has_trained_codes`; it is not changed.
        path: What a message calls its weight.

    Raises:
        UnsupportedError: what it computes with is not what torchao would convert it to.
    """
    if not _is_in_training(module):
        return module.weight
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    # The quantizer notes what it finds.
    quantizer = copy.copy(module.weight_fake_quantizer)
    with torch.no_grad():
        values, settings = quantizer(module.weight), quantizer.config
        try:
            layer = torch.nn.Linear(module.in_features, module.out_features, False, device="meta")
            layer.weight = torch.nn.Parameter(module.weight.detach(), requires_grad=False)
            config = IntxWeightOnlyConfig(
                weight_dtype=settings.dtype,
                granularity=settings.granularity,
                mapping_type=settings.mapping_type,
                scale_dtype=settings.scale_precision,
            )
            quantize_(torch.nn.ModuleDict({"layer": layer}), config)
            same = torch.equal(layer.weight.dequantize().to(values.dtype), values)
        except (AttributeError, AssertionError, NotImplementedError, ValueError) as error:
            raise _unread(path, printable(str(error), 100)) from error
    if not same:
        raise _unread(path, "its codes are not those that torchao converts it to")
    return layer.weight


def _unread(path: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"'{path}' is trained with rounding that cannot be taken as codes ({why}); train with "
        "llm_coreml.qat_config, or convert it first: quantize_(model, QATConfig(step='convert'))."
    )
