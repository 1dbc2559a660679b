"""Methods around Core ML programs: any number of each, with any inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import ArtifactError
from llm_coreml.lower.signature import Signature
from llm_coreml.model import open_model
from llm_coreml.reference import load_method, load_methods
from tiny import llama

ROWS = Signature(
    ("x float32 [1, P]", "start int32 [1]"),
    ("sums float32 [1, P]", "double float32 [1, 1, P]"),
)
BOTH = Signature(("sums float32 [1, P]", "double float32 [1, 1, P]"), ("y float32 [1, P]",))


class _Rows(nn.Module):
    def forward(self, x: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + start.to(torch.float32), (x * 2).unsqueeze(1)


class _Both(nn.Module):
    def forward(self, sums: torch.Tensor, double: torch.Tensor) -> torch.Tensor:
        return sums - double[:, 0]


def test_a_method_calls_several_programs_of_several_inputs_and_outputs(tmp_path: Path) -> None:
    from llm_coreml.lower.method import CoreMLCall, edge_methods, write_methods
    from llm_coreml.lower.program import compile_specs, write_program

    job = resolve(ExportConfig(context=32, compute_precision="fp32"), open_model(llama()).spec)
    specs, blobs = {}, {}
    inside: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
        "rows": (_Rows(), (torch.zeros(1, 3), torch.zeros(1, dtype=torch.int32))),
        "both": (_Both(), (torch.zeros(1, 3), torch.zeros(1, 1, 3))),
    }
    for name, (module, inputs) in inside.items():
        exported = torch.export.export(module, inputs).run_decompositions({})
        specs[name], blobs[name] = compile_specs(exported, job, (3,)), tmp_path / name
        write_program(exported, specs[name], blobs[name])

    rows, both = CoreMLCall("rows", ROWS), CoreMLCall("both", BOTH)

    class _Method(nn.Module):
        def forward(
            self, x: torch.Tensor, start: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            sums, double = rows(x, start)
            (y,) = both(sums, double)
            return y, double

    given = (torch.zeros(1, 3), torch.zeros(1, dtype=torch.int32))
    traced = torch.export.export(_Method(), given)
    edge = edge_methods({"forward": traced, "again": traced}, specs, {"get_vocab_size": 3})
    write_methods(edge.to_executorch(), blobs, tmp_path / "model.pte")

    for method in load_methods(tmp_path / "model.pte").values():
        assert len(method.programs) == 2
        y, double = method.run(
            torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([5], dtype=torch.int32)
        )
        assert y.tolist() == [[4.0, 3.0, 2.0]]
        assert double.tolist() == [[[2.0, 4.0, 6.0]]]


class _Weighted(nn.Module):
    def forward(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return tokens.to(torch.float32).sum(1, keepdim=True) * weights.sum(1, keepdim=True)


def test_enumerated_shapes_of_two_inputs_are_paired(tmp_path: Path) -> None:
    from llm_coreml.lower.method import CoreMLCall, edge_methods, write_methods
    from llm_coreml.lower.program import compile_specs, write_program

    job = resolve(ExportConfig(context=32, compute_precision="fp32"), open_model(llama()).spec)
    given = (torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 6))
    sizes = ({1: Dim.AUTO(min=1, max=32)}, {1: Dim.AUTO(min=1, max=32)})
    exported = torch.export.export(_Weighted(), given, dynamic_shapes=sizes)
    exported = exported.run_decompositions({})
    specs = compile_specs(exported, job, (1, 8), {"weights": [[1, 2], [1, 16]]})
    write_program(exported, specs, tmp_path / "blob")
    call = CoreMLCall(
        "main",
        Signature(("tokens int32 [1, P]", "weights float32 [1, Q]"), ("y float32 [1, 1]",)),
    )

    class _Method(nn.Module):
        def forward(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return call(tokens, weights)[0]

    traced = torch.export.export(_Method(), given, dynamic_shapes=sizes)
    edge = edge_methods({"forward": traced}, {"main": specs}, {})
    write_methods(edge.to_executorch(), {"main": tmp_path / "blob"}, tmp_path / "model.pte")
    forward = load_method(tmp_path / "model.pte")
    for tokens, weights in ((1, 2), (8, 16)):
        told = forward(torch.ones(1, tokens, dtype=torch.int32), torch.ones(1, weights))
        assert told.tolist() == [[tokens * weights]]
    with pytest.raises(ArtifactError, match="are enumerated, but not together"):
        forward(torch.ones(1, 8, dtype=torch.int32), torch.ones(1, 2))


def test_sizes_follow_from_those_of_inputs() -> None:
    length = Dim("P", max=8)
    from llm_coreml.lower.method import CoreMLCall

    call = CoreMLCall("rows", ROWS)

    class _Method(nn.Module):
        def forward(self, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            return call(x, start)[1]

    given = (torch.zeros(1, 3), torch.zeros(1, dtype=torch.int32))
    traced = torch.export.export(_Method(), given, dynamic_shapes=({1: length}, None))
    (output,) = list(traced.graph.nodes)[-1].args[0]
    x, _ = traced.graph.find_nodes(op="placeholder")
    assert str(output.meta["val"].shape[2]) == str(x.meta["val"].shape[1])


def test_a_signature_is_read_as_it_is_written() -> None:
    assert Signature.of(str(ROWS)) == ROWS
    assert [port.sizes for port in ROWS.outputs] == [(1, "P"), (1, 1, "P")]


@pytest.mark.parametrize(
    ("takes", "gives", "told"),
    [
        (("x float32 [1]", "x int32 [1]"), ("y float32 [1]",), "same name"),
        (("x float32 [1]",), ("y float32 [Q]",), "has the size Q"),
        (("x float32 1",), ("y float32 [1]",), "is no name"),
        (("x complex64 [1]",), ("y float32 [1]",), "is no name"),
    ],
)
def test_a_signature_that_cannot_be(
    takes: tuple[str, ...], gives: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        Signature(takes, gives)


def test_a_program_is_given_what_it_takes() -> None:
    with pytest.raises(TypeError, match="start int32"):
        ROWS.results((torch.zeros(1, 3), torch.zeros(1)))
