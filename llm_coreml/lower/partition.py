"""One partition that holds the whole method, except the casts of its two inputs.

ExecuTorch's stock runners feed int64 tokens, and Core ML takes enumerated inputs as int32 only.
So the casts stay with ExecuTorch, and everything that asks for the tokens' length asks the cast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from executorch.backends.apple.coreml.partition import CoreMLPartitioner
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data, tag_mutated_buffer
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from llm_coreml.artifact.description import START_POS, TOKENS

_TAG = "whole_method"


def _inputs(module: GraphModule) -> list[Node]:
    return [
        node
        for node in module.graph.nodes
        if node.op == "placeholder" and node.name in (TOKENS, START_POS)
    ]


class AskTheCast(PassBase):
    """Point `sym_size` of an int64 input at its int32 cast."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Edit the graph in place."""
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        for node in _inputs(graph_module):
            cast = next(user for user in node.users if "_to_copy" in str(user.target))
            placeholders[-1].append(cast)
            for user in list(node.users):
                if "sym_size" in str(user.target):
                    user.replace_input_with(node, cast)
        graph_module.recompile()
        return PassResult(graph_module, True)


class WholeMethodPartitioner(Partitioner):  # type: ignore[misc]
    """Delegate every op but the input casts to Core ML; buffers become states.

    Args:
        backend: Name of the backend.
        compile_specs: Its settings.
        on_partition: Called when the graph is ready for the backend.
    """

    def __init__(
        self,
        backend: str,
        compile_specs: list[CompileSpec],
        on_partition: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._on_partition = on_partition
        self._delegation = DelegationSpec(backend, compile_specs)

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[Node], bool] | None]:
        """Keep whole whatever ExecuTorch's own partitioner keeps whole (attention above all)."""
        kept: tuple[list[torch._ops.OpOverload], Callable[[Node], bool] | None]
        kept = CoreMLPartitioner().ops_to_not_decompose(ep)
        return kept

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the graph."""
        self._on_partition()
        inputs = set(_inputs(exported_program.graph_module))
        for node in exported_program.graph.nodes:
            if node.op == "call_function" and not inputs.intersection(node.all_input_nodes):
                node.meta["delegation_tag"] = _TAG
        tag_constant_data(exported_program)
        tag_mutated_buffer(exported_program)
        return PartitionResult(
            tagged_exported_program=exported_program,
            partition_tags={_TAG: self._delegation},
        )
