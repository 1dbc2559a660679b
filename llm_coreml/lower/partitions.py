"""Lower a decoder to several Core ML programs that one method runs one after the other.

    lower_partitions(decoder, job, description, cut.shares, Path("model.pte"))

Each part is traced, converted and written before the next one is: what a conversion takes of
memory is that of the largest part. Each has states of its own, for its layers alone; what goes
from one to the next is a tensor of the method, with the padded length that all of them have.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import nn
from torch.export import ExportedProgram
from torchao.quantization import IntxUnpackedToInt8Tensor

from llm_coreml.artifact.description import (
    HIDDEN,
    LAST_POS,
    START_POS,
    TOKENS,
    WEIGHTS,
    Description,
)
from llm_coreml.config import Job
from llm_coreml.decoder import Decoder
from llm_coreml.decoder.ends import Products, Rows
from llm_coreml.decoder.parts import Part, Share
from llm_coreml.decoder.states import state_specs
from llm_coreml.lower.coreml import head_outputs
from llm_coreml.lower.method import CoreMLCall, edge_methods, write_methods
from llm_coreml.lower.multifunction import reference
from llm_coreml.lower.padded import method_around
from llm_coreml.lower.program import (
    compile_specs,
    enumerated,
    save_package,
    write_functions,
    write_program,
)
from llm_coreml.lower.signature import Signature, empty
from llm_coreml.lower.traced import name_results, trace_method, trace_part
from llm_coreml.machine import uncollected


def lower_partitions(
    decoder: Decoder,
    job: Job,
    description: Description,
    shares: Sequence[Share],
    path: Path,
    on_progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Write the program, see `coreml.lower_coreml`.

    Args:
        decoder: See there.
        job: See there.
        description: See there; its methods are one, or have one length each and share the weights.
        shares: What each partition has.
        path: See there.
        on_progress: See there.
    """
    with uncollected(), tempfile.TemporaryDirectory(prefix="llm-coreml-") as folder:
        work = _Work(decoder, job, description, Path(folder), {}, {}, {}, [])
        calls: dict[str, list[CoreMLCall]] = {name: [] for name in description.methods}
        for number, share in enumerate(shares):
            for method, call in work.write(number, share).items():
                calls[method].append(call)
            on_progress((number + 1) / (len(shares) + 1))
        caches = list(empty(description.caches).values())
        first = _rows(decoder, work.border) if shares[0].table_outside else None
        last = Products(decoder) if shares[-1].head_outside else None
        methods = {}
        for name, form in description.methods.items():
            padding = None if description.ranged else form.seq_lengths
            program = _InARow(calls[name], len(description.head.gives), first, last, work.handed)
            around = method_around(
                program, description.context, padding, description.outputs_by_row
            )
            methods[name] = trace_method(around, form.seq_lengths[-1], caches)
        edge = edge_methods(methods, work.specs, description.constant_methods)
        write_methods(edge.to_executorch(), work.blobs, path, work.shared)


# What the rows are called that go on to the next part: no output has an input's name.
_LEAVING = f"{HIDDEN}_out"


@dataclass(frozen=True)
class _Work:
    """What all parts are written by and to.

    Attributes:
        decoder: See `lower_partitions`, as the next two are.
        job: As said.
        description: As said.
        folder: For what is written.
        specs: Compile specs of every program, by its name.
        blobs: What its delegate is given.
        shared: Files that several delegates refer to.
        handed: Of every part, the weights that its programs are given, in order.
    """

    decoder: Decoder
    job: Job
    description: Description
    folder: Path
    specs: dict[str, list[CompileSpec]]
    blobs: dict[str, Path | bytes]
    shared: dict[str, Path]
    handed: list[nn.ParameterList]

    def write(self, number: int, share: Share) -> dict[str, CoreMLCall]:
        """Write a part, and return what each method calls."""
        part = Part(self.decoder, share, self.border)
        weights = self._weights(part)
        self.handed.append(nn.ParameterList(weights.values()))
        names = {method: f"{method}_{number}" for method in self.description.methods}
        blob = self.folder / f"blob_{number}"
        if not self.job.functions:
            ((method, name),) = names.items()
            exported = self._traced(part, method, weights)
            self.specs[name] = self._specs(exported, share)
            write_program(exported, self.specs[name], blob)
            self.blobs[name] = blob
        else:
            packages = {}
            for method, name in names.items():
                exported = self._traced(part, method, weights)
                self.specs[name] = compile_specs(exported, self.job, ())
                packages[method] = self.folder / f"{name}.mlpackage"
                save_package(exported, self.specs[name], packages[method])
            key = write_functions(packages, blob)
            self.shared[key] = blob
            self.blobs.update({name: reference(key, method) for method, name in names.items()})
            for package in packages.values():
                shutil.rmtree(package)
        return {
            method: CoreMLCall(name, self._signature(share, method, weights))
            for method, name in names.items()
        }

    @property
    def border(self) -> torch.dtype:
        """The type of what goes from part to part: what a program computes with."""
        return torch.float16 if self.job.precision.name == "fp16" else torch.float32

    def _lengths(self, share: Share, method: str) -> tuple[int, ...]:
        """Return how many rows a part may be given: the head alone is given what it reads."""
        lengths = self.description.methods[method].seq_lengths
        return lengths if share.takes_rows(self.decoder.logits == "all") else (1,)

    def _caches(self, share: Share) -> dict[str, str]:
        """Return the caches that a part takes and gives."""
        found = state_specs(self.decoder.spec, self.decoder.extent, share.layers)
        caches = self.description.caches
        return {state.name: caches[state.name] for state in found} if caches else {}

    def _weights(self, part: Part) -> dict[str, nn.Parameter]:
        """Return what a part is given as inputs, by name: nothing where its programs have it."""
        if self.job.constants != "inputs":
            return {}
        return {
            name: nn.Parameter(weight.detach().to(self.border), requires_grad=False)
            for name, weight in part.weights.items()
        }

    def _traced(
        self, part: Part, method: str, weights: Mapping[str, torch.Tensor]
    ) -> ExportedProgram:
        share, ranged = part.share, self.description.ranged
        width = None if share.takes_tokens else share.entering(self.decoder.spec)
        lengths, caches = self._lengths(share, method), empty(self._caches(share))
        # coremltools wants the writes of the states among the results.
        exported = trace_part(part, width, lengths, ranged, caches, weights)
        decomposed: ExportedProgram = exported.run_decompositions({})
        results = self.description.head.gives if share.gives_results else (_LEAVING,)
        name_results(decomposed, (*results, *(f"{name}_out" for name in caches)))
        return decomposed

    def _specs(self, exported: ExportedProgram, share: Share) -> list[CompileSpec]:
        specs = compile_specs(exported, self.job, ())
        lengths = self._lengths(share, self.description.main)
        if len(lengths) > 1 and not self.description.ranged:
            last = () if share.takes_tokens else (share.entering(self.decoder.spec),)
            shapes = {_entering(share): [(1, length, *last) for length in lengths]}
            specs.append(enumerated(exported, shapes))
        return specs

    def _signature(
        self, share: Share, method: str, weights: Mapping[str, torch.Tensor]
    ) -> Signature:
        spec, longest = self.decoder.spec, self.description.methods[method].seq_lengths[-1]
        size = "P" if longest > 1 else 1
        every_row = self.decoder.logits == "all"
        taken = size if share.takes_rows(every_row) else 1
        given = size if share.gives_rows(spec, every_row) else 1
        dtype = str(self.border).removeprefix("torch.")
        caches = tuple(f"{name} {text}" for name, text in self._caches(share).items())
        first = f"{TOKENS} int32 [1, {taken}]"
        if not share.takes_tokens:
            first = f"{HIDDEN} {dtype} [1, {taken}, {share.entering(spec)}]"
        positions: tuple[str, ...] = ()
        if share.takes_positions(spec):
            names = (START_POS, LAST_POS) if longest > 1 else (START_POS,)
            positions = tuple(f"{name} int32 [1]" for name in names)
        left: tuple[str, ...] = (f"{HIDDEN} {dtype} [1, {given}, {share.leaving(spec)}]",)
        if share.gives_results:
            left = head_outputs(self.description, given)
        handed = [
            f"{WEIGHTS}{name.replace('.', '_')} {dtype} {list(weight.shape)}"
            for name, weight in weights.items()
        ]
        return Signature((*handed, first, *caches, *positions), (*left, *caches))


def _entering(share: Share) -> str:
    return TOKENS if share.takes_tokens else HIDDEN


def _rows(decoder: Decoder, dtype: torch.dtype) -> Rows:
    """Return what reads the token table outside of Core ML."""
    table = decoder.embed_tokens.weight
    if isinstance(table, IntxUnpackedToInt8Tensor):
        # They are fp16 numbers already.
        return Rows(table.qdata, table.scale.to(torch.float16), dtype)
    return Rows(table, None, dtype)


class _InARow(nn.Module):
    """The calls one after the other, as one program; see `padded.Program`.

    Args:
        calls: Of the programs.
        results: How many things the last one gives before its caches.
        first: What ExecuTorch's kernels do before the programs, None if nothing.
        last: What they do behind them.
        handed: What each of the programs is given before anything else.
    """

    def __init__(
        self,
        calls: Sequence[CoreMLCall],
        results: int,
        first: Rows | None,
        last: Products | None,
        handed: Sequence[nn.ParameterList],
    ) -> None:
        super().__init__()
        self._calls = tuple(calls)
        self._results = results
        self.first = first
        self.last = last
        self.handed = nn.ModuleList(handed)

    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: torch.Tensor,
        last_pos: torch.Tensor | None,
        *caches: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return what the last call gives, and what becomes of the caches."""
        first = tokens if self.first is None else self.first(tokens)
        given: tuple[torch.Tensor, ...] = (first,)
        returned: list[torch.Tensor] = []
        left = iter(caches)
        for call, weights in zip(self._calls, self.handed, strict=True):
            assert isinstance(weights, nn.ParameterList)
            count = self._results if call is self._calls[-1] else 1
            names = {port.name for port in call.signature.inputs}
            own = itertools.islice(left, len(call.signature.gives) - count)
            told = {START_POS: start_pos, LAST_POS: last_pos}
            positions = [value for name, value in told.items() if name in names]
            rest = [value for value in positions if value is not None]
            found = call(*weights, given[0], *own, *rest)
            given = found[:count]
            returned += found[count:]
        given = given if self.last is None else (self.last(given[0]),)
        return (*given, *returned) if len(given) + len(returned) > 1 else given[0]
