"""Lower tiny models to `.pte` files, and look inside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_coreml.artifact import pte
from llm_coreml.artifact.dtypes import DTYPES
from llm_coreml.artifact.inmemoryfs import unpack
from llm_coreml.artifact.method_plan import Method
from llm_coreml.artifact.mil import Constant, Function, Operation, TensorType
from llm_coreml.artifact.milproto import parse
from llm_coreml.config import ExportConfig, Job, Shapes, resolve
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.model import open_model
from llm_coreml.quantize import QuantizationPlan, make_plan
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.reference.ops.constexpr import (
    constexpr_blockwise_shift_scale,
    constexpr_lut_to_dense,
)
from llm_coreml.reference.ops.storage import to_tensor
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner
from shared import Shared

UNQUANTIZED: dict[str, Any] = {"scheme": "none", "embedding": "none"}
# label -> settings; together they put every format into the blocks, the table and the head.
SCHEMES: dict[str, dict[str, Any]] = {
    "int4-group-32": {"scheme": "int4-group"},
    "int4-group-8": {
        "scheme": "int4-group",
        "group_size": 8,
        "embedding": "none",
        "lm_head": "int4-channel",
    },
    "int4-channel": {"scheme": "int4-channel", "embedding": "int4-channel"},
    "int8-channel": {"scheme": "int8-channel", "embedding": "int4-group", "lm_head": "none"},
    "codebook-1": {"bits": 1, "embedding": "codebook:6", "lm_head": "int4-group"},
    "codebook-2": {"bits": 2, "embedding": "codebook:8", "lm_head": "codebook:1"},
    "codebook-3": {"bits": 3, "codebook_rows": 8, "embedding": "codebook:3"},
    "codebook-4": {"bits": 4, "scheme": "codebook", "codebook_rows": 1, "target": "ane"},
    "codebook-6": {"bits": 6, "embedding": "codebook:2", "lm_head": "codebook:4"},
    "int3-group": {
        "scheme": "int3-group",
        "zero_point": "int",
        "embedding": "mxfp4",
        "lm_head": "codebook:6",
        "codebook_vector": 2,
        "minimum_os": "iOS26",
    },
    "codebook-8": {"bits": 8, "scheme": "codebook", "lm_head": "codebook:8"},
}
TIED = ("int4-channel", "codebook-3", "codebook-6")
# Codebooks of 1, 6 and 8 bits are in matrices of the others too, tied and untied.
FURTHER = ("codebook-1", "codebook-6", "codebook-8")


@dataclass(frozen=True)
class Artifact:
    """A lowered decoder beside the eager one that it was made from."""

    path: Path
    decoder: Decoder
    plan: QuantizationPlan
    job: Job

    @property
    def shapes(self) -> Shapes:
        """Context and lengths."""
        return self.job.shapes

    def runner(self) -> ReferenceRunner:
        return ReferenceRunner(self.path)


@dataclass(frozen=True)
class StoredMatrix:
    """A weight matrix as the program holds it.

    Attributes:
        dense: Its values in fp32, before the rounding to the declared type.
        declared: The type that the program gives the dense matrix.
        bytes: What codes, scales and tables take in the weight file, without alignment.
    """

    dense: torch.Tensor
    declared: str
    bytes: int


def lower(source: Any, config: ExportConfig, place: Path | Shared) -> Artifact:
    """Quantize and lower a folder or live model, without verifying it.

    Args:
        source: what `open_model` takes.
        config: how.
        place: the file to write; or where all workers find one and the same file, so that what is
            the same is lowered once.
    """
    from llm_coreml.lower.forms import form_for
    from llm_coreml.lower.shares import cut_of

    model = open_model(source)
    job = resolve(config, model.spec)
    plan = make_plan(job, model.spec)
    decoder = build_decoder(model, job, plan)
    cut = cut_of(job, model.spec, plan)
    form = form_for(job, model.spec, bos_id=1, eos_ids=(2, 5), cut=cut)

    def write(path: Path) -> None:
        form.write(decoder, path)

    if isinstance(place, Shared):
        place = place.file("model.pte", (source, config), write)
    else:
        write(place)
    return Artifact(place, decoder, plan, job)


def method(path: Path) -> Method:
    """Return the plan of `forward`."""
    return pte.read(path).methods["forward"]


def files(path: Path) -> dict[str, memoryview]:
    """Return the files of the only delegate, by path."""
    (delegate,) = method(path).delegates
    return unpack(delegate.data)


def program(path: Path) -> Function:
    """Return the only function of the Core ML program."""
    (function,) = parse(files(path), "model.mlpackage").functions.values()
    return function


def weight_bytes(path: Path) -> int:
    """Return the size of `weight.bin`."""
    (size,) = [len(data) for name, data in files(path).items() if name.endswith("weight.bin")]
    return size


def matrices(path: Path, spec: DecoderSpec) -> dict[str, StoredMatrix]:
    """Return every matrix of the program under the decoder's name of its module.

    Linear operations come in the order of the decoder's own; the token table is what `gather`
    reads with as many rows as the vocabulary.
    """
    sources = _sources(path)
    operations = _matrix_operations(path, spec)
    return {name: _stored(sources, op) for name, op in operations.items()}


def matrix_names(path: Path, spec: DecoderSpec) -> dict[str, str]:
    """Return what the program calls each matrix, under the decoder's name of its module."""
    operations = _matrix_operations(path, spec)
    return {name: op.outputs[0].name for name, op in operations.items()}


def constant_operations(path: Path, spec: DecoderSpec) -> dict[str, str]:
    """Return the operations that each matrix is made of, with the types of what they read."""
    sources = _sources(path)
    found = {}
    for name, op in _matrix_operations(path, spec).items():
        chain = [op]
        while inner := [op for op in _inputs(sources, chain[0]) if op.type != "const"]:
            chain[:0] = inner
        found[name] = ", ".join(f"`{op.type}({_types(sources, op)})`" for op in chain)
    return found


def _inputs(sources: dict[str, Operation], op: Operation) -> list[Operation]:
    names = [name for bound in op.inputs.values() for name in bound if isinstance(name, str)]
    return [sources[name] for name in names]


def _types(sources: dict[str, Operation], op: Operation) -> str:
    types = []
    for parameter in ("data", "offset", "indices", "lut", "scale"):
        for bound in op.inputs.get(parameter, ()):
            held = sources[bound].outputs[0].type if isinstance(bound, str) else bound.type
            assert isinstance(held, TensorType)
            types.append(f"{parameter} {held.dtype}")
    return ", ".join(types)


def _sources(path: Path) -> dict[str, Operation]:
    return {output.name: op for op in program(path).operations for output in op.outputs}


def _matrix_operations(path: Path, spec: DecoderSpec) -> dict[str, Operation]:
    """Return the operation that gives each matrix, under the decoder's name of its module."""
    sources, operations = _sources(path), program(path).operations
    table, *names = [name for stage in Decoder(spec, context=1).wiring.shared for name in stage]
    linears = [_source(sources, op, "weight") for op in operations if op.type == "linear"]
    tables = [_source(sources, op, "x") for op in operations if op.type == "gather"]
    (gathered,) = [op for op in tables if op is not None and _shape(op)[0] == spec.vocab_size]
    return {**dict(zip(names, linears, strict=True)), table: gathered}


def _source(sources: dict[str, Operation], op: Operation, parameter: str) -> Any:
    (binding,) = op.inputs[parameter]
    assert isinstance(binding, str)
    source = sources.get(binding)
    return source if source is not None and source.type.startswith("const") else None


def _shape(op: Operation) -> tuple[int | None, ...]:
    declared = op.outputs[0].type
    assert isinstance(declared, TensorType)
    return declared.shape


def _constant(sources: dict[str, Operation], op: Operation, parameter: str) -> Constant:
    if parameter in op.attributes:
        return op.attributes[parameter]
    (binding,) = op.inputs[parameter]
    return sources[binding].attributes["val"] if isinstance(binding, str) else binding


def _array(constant: Constant) -> tuple[torch.Tensor, int]:
    """Return a constant's values, and the bytes that they take packed."""
    assert isinstance(constant.type, TensorType)
    values = np.array(constant.value())
    bits = DTYPES[constant.type.dtype].bits * values.size
    return to_tensor(values, constant.type.dtype), math.ceil(bits / 8)


def _stored(sources: dict[str, Operation], op: Operation) -> StoredMatrix:
    declared = op.outputs[0].type
    assert isinstance(declared, TensorType)
    values, size = _expanded(sources, op)
    return StoredMatrix(values.to(torch.float32), declared.dtype, size)


def _expanded(sources: dict[str, Operation], op: Operation) -> tuple[torch.Tensor, int]:
    """Return what a constant operation gives, and the bytes of all that it is made of."""
    kinds: dict[str, tuple[str, ...]] = {
        "const": ("val",),
        "constexpr_blockwise_shift_scale": ("data", "scale", "offset"),
        "constexpr_lut_to_dense": ("indices", "lut"),
    }
    parts: dict[str, tuple[torch.Tensor, int]] = {}
    for parameter in kinds[op.type]:
        if parameter not in op.inputs and parameter not in op.attributes:
            continue
        bindings = op.inputs.get(parameter, ())
        inner = next((sources[name] for name in bindings if isinstance(name, str)), None)
        if inner is not None and inner.type != "const":
            parts[parameter] = _expanded(sources, inner)
        else:
            parts[parameter] = _array(_constant(sources, op, parameter))
    values = {name: part[0] for name, part in parts.items()}
    size = sum(part[1] for part in parts.values())
    if op.type == "const":
        return values["val"], size
    if op.type == "constexpr_lut_to_dense":
        axis = None
        if "vector_axis" in op.inputs:
            axis = int(_array(_constant(sources, op, "vector_axis"))[0])
        return constexpr_lut_to_dense(**values, vector_axis=axis), size
    values["scale"] = values["scale"].to(torch.float32)
    return constexpr_blockwise_shift_scale(**values), size


def feed(runner: Runner, tokens: Sequence[int], parts: Sequence[int]) -> torch.Tensor:
    """Feed `tokens` from an empty cache in chunks of the lengths `parts`; all rows returned."""
    runner.reset()
    rows, start = [], 0
    for length in parts:
        rows.append(runner.step(tokens[start : start + length]))
        start += length
    return torch.cat(rows)
