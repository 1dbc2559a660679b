"""Conversion with coremltools, as its users do it: trace a module, convert, save, load."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import coremltools as ct
import torch

from llm_coreml.reference import CoreMLProgram, load


def convert(module: torch.nn.Module, example: tuple[torch.Tensor, ...], **options: Any) -> Any:
    """Trace `module` and return coremltools' model of it; `options` are those of `ct.convert`."""
    with warnings.catch_warnings():
        # torch deprecates tracing, the way of coremltools' documentation; coremltools names the
        # outputs of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*has been renamed", category=UserWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(module.eval(), example)
        return ct.convert(traced, convert_to="mlprogram", skip_model_load=True, **options)


def saved(model: Any, folder: Path) -> CoreMLProgram:
    """Write `model` as a package into `folder` and load that."""
    path = folder / "model.mlpackage"
    model.save(str(path))
    return load(path)
