"""The method of an ExecuTorch program that calls one Core ML program, and its few ops around it.

ExecuTorch's stock runners feed int64 tokens, and Core ML takes enumerated inputs as int32 only: the
casts are ExecuTorch's. The Core ML program is one op, so that ExecuTorch, whose dialects and passes
cost as much as a conversion, never sees what is inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import nn
from torch.export import ExportedProgram

from llm_coreml.artifact.method_plan import Constant
from llm_coreml.lower.traced import trace

_TAG = "core_ml"


@torch.library.custom_op("llm_coreml::core_ml_program", mutates_args=())
def core_ml_program(
    tokens: torch.Tensor, start_pos: torch.Tensor, every_row: bool, vocab_size: int
) -> torch.Tensor:
    """Stand for a Core ML program: nothing runs it but a device, and our reference runtime.

    Args:
        tokens: int32 `[1, S]`.
        start_pos: int32 `[1]`.
        every_row: Whether it returns every row of a chunk, or the last.
        vocab_size: Columns of the logits.

    Returns:
        float32 logits, `[1, S, vocab_size]` or `[1, 1, vocab_size]`.
    """
    raise NotImplementedError("a Core ML program is not run by torch")


@core_ml_program.register_fake
def _(
    tokens: torch.Tensor, start_pos: torch.Tensor, every_row: bool, vocab_size: int
) -> torch.Tensor:
    rows = tokens.shape[1] if every_row else 1
    return torch.empty(1, rows, vocab_size, dtype=torch.float32)


_PROGRAM = core_ml_program._opoverload


class Method(nn.Module):
    """`forward(tokens int64 [1, S], start_pos int64 [1]) -> logits float32`.

    Args:
        every_row: Whether the program returns every row of a chunk, or the last.
        vocab_size: Columns of the logits.
    """

    def __init__(self, every_row: bool, vocab_size: int) -> None:
        super().__init__()
        self.every_row = every_row
        self.vocab_size = vocab_size

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        """Call the program with int32 inputs."""
        narrow = tokens.to(torch.int32), start_pos.to(torch.int32)
        logits: torch.Tensor = core_ml_program(*narrow, self.every_row, self.vocab_size)
        return logits


def edge_method(
    method: Method,
    lengths: Sequence[int],
    context: int,
    constants: Mapping[str, Constant],
    specs: list[CompileSpec],
) -> EdgeProgramManager:
    """Return the method, with an empty delegate in the place of the Core ML program.

    Args:
        method: What to export.
        lengths: What S may be, see `trace`.
        context: Positions of the states.
        constants: Constant methods, see `traced.constant_methods`.
        specs: What the delegate is told when it is loaded.
    """
    edge = to_edge_transform_and_lower(
        trace(method, lengths, context),
        partitioner=[_ProgramPartitioner(specs)],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=dict(constants),
    )
    _name_backend(edge)
    return edge


class _ProgramPartitioner(Partitioner):  # type: ignore[misc]
    """Delegates the op that stands for the Core ML program, and nothing else."""

    def __init__(self, specs: list[CompileSpec]) -> None:
        super().__init__()
        self._delegation = DelegationSpec(_Prepared.__name__, specs)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the op."""
        for node in exported_program.graph.nodes:
            if isinstance(node.target, EdgeOpOverload) and node.target._op == _PROGRAM:
                node.meta["delegation_tag"] = _TAG
        return PartitionResult(
            tagged_exported_program=exported_program, partition_tags={_TAG: self._delegation}
        )


class _Prepared(BackendDetails):  # type: ignore[misc]
    """Compiles nothing: the program has been written already.

    ExecuTorch finds a backend by the name of its class.
    """

    @staticmethod
    def preprocess(
        edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> PreprocessResult:
        """Return an empty delegate."""
        return PreprocessResult(processed_bytes=b"")


def _name_backend(edge: EdgeProgramManager) -> None:
    """Give the delegate to the backend that devices have."""
    module: Any = edge.exported_program().graph_module
    for child in module.children():
        if isinstance(child, LoweredBackendModule):
            child._backend_id = CoreMLBackend.__name__
