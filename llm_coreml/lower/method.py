"""The methods of an ExecuTorch program, in which a Core ML program is one op.

So ExecuTorch, whose dialects and passes cost as much as a conversion, never sees what is inside,
and the program's length is a symbol of its own: in the method it is an expression of the number of
tokens (`padded.py`), of which Core ML's enumerated shapes cannot be told.

    call = CoreMLCall("main", Signature(takes, gives))   # called in a module's forward
    edge = edge_methods({"forward": traced}, {"main": specs}, constants)
    write_methods(edge.to_executorch(), {"main": blob}, path)

A method may call one such program or several, each with any inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch.export import ExportedProgram

from llm_coreml.artifact.method_plan import Constant
from llm_coreml.lower.signature import Signature

# Specifications of each Core ML program, by its name.
Specs = Mapping[str, list[CompileSpec]]


@torch.library.custom_op("llm_coreml::core_ml_program", mutates_args=())
def core_ml_program(
    inputs: Sequence[torch.Tensor], name: str, signature: str
) -> list[torch.Tensor]:
    """Stand for a Core ML program: nothing runs it but a device, and our reference runtime.

    Args:
        inputs: What the program takes, in order.
        name: Which program.
        signature: What it takes and gives, as `Signature.of` reads it.

    Returns:
        What it gives, in order.
    """
    raise NotImplementedError("a Core ML program is not run by torch")


@core_ml_program.register_fake
def _(inputs: Sequence[torch.Tensor], name: str, signature: str) -> list[torch.Tensor]:
    return Signature.of(signature).results(inputs)


_PROGRAM = core_ml_program._opoverload


@final
class CoreMLCall:
    """What a method calls where a Core ML program is to run.

    Args:
        name: Of the program, unique in the method.
        signature: What it takes and gives.
    """

    def __init__(self, name: str, signature: Signature) -> None:
        self.name = name
        self.signature = signature

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the program gives for `inputs`, as `signature` has both."""
        return tuple(core_ml_program(list(inputs), self.name, str(self.signature)))


def edge_methods(
    methods: Mapping[str, ExportedProgram], specs: Specs, constants: Mapping[str, Constant]
) -> EdgeProgramManager:
    """Return the methods, with a delegate that holds its name in the place of each program.

    Args:
        methods: What is exported, around calls of `CoreMLCall`, by the methods' names.
        specs: What the delegate of each Core ML program is told when it is loaded.
        constants: Constant methods, see `traced.constant_methods`.
    """
    edge = to_edge_transform_and_lower(
        dict(methods),
        partitioner=[_ProgramPartitioner(specs)],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=dict(constants),
    )
    for name in methods:
        _name_backend(edge, name)
    return edge


def write_methods(
    program: ExecutorchProgramManager,
    blobs: Mapping[str, Path | bytes],
    path: Path,
    shared: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """Write the `.pte`.

    Args:
        program: Of `edge_methods`.
        blobs: What each Core ML program's delegate is given, by the program's name: bytes, or the
            file that holds them.
        path: Where to write.
        shared: Files that blobs refer to by these names.
    """
    for delegate in program.executorch_program.backend_delegate_data:
        blob = blobs[bytes(delegate.data).decode()]
        delegate.data = blob if isinstance(blob, bytes) else FileBackedData(str(blob))
    store = NamedDataStore()
    for name, stored in shared.items():
        store.add_named_data(name, FileBackedData(str(stored)))
    content, _ = serialize_for_executorch(
        program._emitter_output,
        ExecutorchBackendConfig(),
        program._data_serializer,
        store.get_named_data_store_output() if shared else None,
    )
    with path.open("wb") as file:
        content.write_to_file(file)


class _ProgramPartitioner(Partitioner):  # type: ignore[misc]
    """Delegates the ops that stand for Core ML programs, each by itself, and nothing else."""

    def __init__(self, specs: Specs) -> None:
        super().__init__()
        self._delegations = {
            name: DelegationSpec(_Prepared.__name__, own) for name, own in specs.items()
        }

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the ops, and what takes their outputs apart."""
        found = {}
        for node in exported_program.graph.nodes:
            if _calls_program(node):
                name = node.args[1]
                found[name] = self._delegations[name]
                for part in (node, *node.users):
                    part.meta["delegation_tag"] = name
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=found)


class _Prepared(BackendDetails):  # type: ignore[misc]
    """Compiles nothing: the program has been written already.

    ExecuTorch finds a backend by the name of its class.
    """

    @staticmethod
    def preprocess(
        edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> PreprocessResult:
        """Return a delegate that holds the program's name.

        Raises:
            AssertionError: inputs or outputs are not in the order of the op's, by which Core ML
                has them.
        """
        nodes = list(edge_program.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        (call,) = [node for node in nodes if _calls_program(node)]
        if inputs != call.args[0]:
            raise AssertionError(f"{call} is called with {call.args[0]}, not {inputs}")
        (given,) = nodes[-1].args
        order = [node.args[1] for node in given]
        if order != list(range(len(Signature.of(call.args[2]).gives))):
            raise AssertionError(f"{call} gives its outputs in the order {order}")
        return PreprocessResult(processed_bytes=call.args[1].encode())


def _calls_program(node: torch.fx.Node) -> bool:
    return isinstance(node.target, EdgeOpOverload) and node.target._op == _PROGRAM


def _name_backend(edge: EdgeProgramManager, name: str) -> None:
    """Give the delegates of a method to the backend that devices have."""
    module: Any = edge.exported_program(name).graph_module
    for child in module.children():
        if isinstance(child, LoweredBackendModule):
            child._backend_id = CoreMLBackend.__name__
