"""The method of an ExecuTorch program, in which one Core ML program is one op.

So ExecuTorch, whose dialects and passes cost as much as a conversion, never sees what is inside,
and the program's length is a symbol of its own: in the method it is an expression of the number of
tokens (`padded.py`), of which Core ML's enumerated shapes cannot be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch.export import ExportedProgram

from llm_coreml.artifact.description import Description
from llm_coreml.artifact.method_plan import Constant
from llm_coreml.lower.padded import Method, Program
from llm_coreml.lower.traced import trace_method

_TAG = "core_ml"


@torch.library.custom_op("llm_coreml::core_ml_program", mutates_args=())
def core_ml_program(
    tokens: torch.Tensor,
    start_pos: torch.Tensor,
    last_pos: torch.Tensor | None,
    every_row: bool,
    vocab_size: int,
) -> torch.Tensor:
    """Stand for a Core ML program: nothing runs it but a device, and our reference runtime.

    Args:
        tokens: int32 `[1, P]`.
        start_pos: int32 `[1]`.
        last_pos: int32 `[1]`, see `Decoder.forward`; None where P is always 1.
        every_row: Whether it returns every row of a chunk, or the last.
        vocab_size: Columns of the logits.

    Returns:
        float32 logits, `[1, P, vocab_size]` or `[1, 1, vocab_size]`.
    """
    raise NotImplementedError("a Core ML program is not run by torch")


@core_ml_program.register_fake
def _(
    tokens: torch.Tensor,
    start_pos: torch.Tensor,
    last_pos: torch.Tensor | None,
    every_row: bool,
    vocab_size: int,
) -> torch.Tensor:
    rows = tokens.shape[1] if every_row else 1
    return torch.empty(1, rows, vocab_size, dtype=torch.float32)


_PROGRAM = core_ml_program._opoverload


def program_of(description: Description, vocab_size: int) -> Program:
    """Return what a method calls where the Core ML program is to run."""
    return partial(core_ml_program, every_row=description.every_row, vocab_size=vocab_size)


def edge_method(
    method: Method, longest: int, constants: Mapping[str, Constant], specs: list[CompileSpec]
) -> EdgeProgramManager:
    """Return the method, with an empty delegate in the place of the Core ML program.

    Args:
        method: What to export, around `program_of`.
        longest: The most tokens of a call.
        constants: Constant methods, see `traced.constant_methods`.
        specs: What the delegate is told when it is loaded.
    """
    edge = to_edge_transform_and_lower(
        trace_method(method, longest),
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
        """Return an empty delegate.

        Raises:
            AssertionError: the inputs are not in the order of the op's, by which Core ML has them.
        """
        inputs = [node for node in edge_program.graph.nodes if node.op == "placeholder"]
        (call,) = [node for node in edge_program.graph.nodes if node.op == "call_function"]
        if inputs != call.all_input_nodes:
            raise AssertionError(f"{call} is called with {call.all_input_nodes}, not {inputs}")
        return PreprocessResult(processed_bytes=b"")


def _name_backend(edge: EdgeProgramManager) -> None:
    """Give the delegate to the backend that devices have."""
    module: Any = edge.exported_program().graph_module
    for child in module.children():
        if isinstance(child, LoweredBackendModule):
            child._backend_id = CoreMLBackend.__name__
