"""Lowering to a `.pte` by ExecuTorch alone, as its own Core ML tests do it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import torch


def specs(precision: Any, target: Any = ct.target.iOS18) -> list[Any]:
    """Return the compile specs of a Core ML program of that precision."""
    from executorch.backends.apple.coreml.compiler import CoreMLBackend

    return CoreMLBackend.generate_compile_specs(
        compute_precision=precision, minimum_deployment_target=target
    )


def lower(
    module: torch.nn.Module | torch.export.ExportedProgram,
    inputs: tuple[Any, ...],
    compile_specs: Sequence[Any],
    path: Path,
    *,
    dynamic_shapes: Any = None,
    **options: Any,
) -> Path:
    """Write `module` as a `.pte`; `options` are those of `CoreMLPartitioner`."""
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.exir import to_edge_transform_and_lower

    if isinstance(module, torch.nn.Module):
        module = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes)
    partitioner = CoreMLPartitioner(compile_specs=list(compile_specs), **options)
    edge = to_edge_transform_and_lower(module, partitioner=[partitioner])
    path.write_bytes(edge.to_executorch().buffer)
    return path
