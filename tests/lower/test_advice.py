"""Known failures of a conversion: the library says its words, and people are told what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools as ct
import pytest
import torch
from coremltools.converters.mil.backend.mil import load as mil_backend
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from torch import nn
from torch.nn import functional as F

from llm_coreml.artifact.inmemoryfs import unpack
from llm_coreml.artifact.mil import Model
from llm_coreml.artifact.milproto import parse
from llm_coreml.errors import UnsupportedError
from llm_coreml.lower.advice import advised, check_systems
from llm_coreml.lower.program import write_program


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(x)
        return self.count * 2


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.half())


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    layers = nn.Sequential(nn.Linear(8, 8), module).eval()
    return torch.export.export(layers, (torch.zeros(4, 8),)).run_decompositions({})


def converted(module: nn.Module, target: Any, path: Path) -> Model:
    specs = CoreMLBackend.generate_compile_specs(minimum_deployment_target=target)
    write_program(exported(module), specs, path)
    return parse(unpack(path.read_bytes()), "model.mlpackage")


FAILURES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "an epsilon of fp32": (
        lambda: Of(lambda x: F.rms_norm(x.half(), (8,), eps=1e-5)),
        ct.target.iOS18,
        r"The operation add in 1 takes one element type, and is given y in fp32 and x in fp16\. .*"
        r"\(--compute-precision fp32\)",
    ),
    "a gain of fp32 on an older system": (
        Halved,
        ct.target.iOS16,
        r"layer_norm in 1\.norm .* gamma in fp32 and x in fp16\. .*--compute-precision",
    ),
    "an operation that no system has": (
        lambda: Of(torch.special.bessel_j0),
        ct.target.iOS18,
        r"no conversion for the operation special_bessel_j0 in 1, .*--backend xnnpack",
    ),
    "an operation of a later system": (
        lambda: Of(lambda x: F.pixel_unshuffle(x.reshape(1, 1, 4, 8), 2)),
        ct.target.iOS15,
        r"pixel_unshuffle in 1 begins with iOS16, and the program is for iOS15; give --minimum-os "
        r"iOS16\.",
    ),
    "a state on a system without": (
        Counting,
        ct.target.iOS17,
        r"remembers something between calls.* from iOS18 on.* for iOS17; give --minimum-os iOS18",
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_known_failures_are_told_with_cause_and_flag(what: str, tmp_path: Path) -> None:
    make, target, told = FAILURES[what]
    with pytest.raises(UnsupportedError, match=told) as caught:
        converted(make(), target, tmp_path / "blob")
    assert caught.value.__cause__ is not None and str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_a_python_that_coremltools_was_not_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mil_backend, "BlobWriter", None)  # as its import leaves it there
    with pytest.raises(UnsupportedError, match=r"BlobWriter not loaded.* Python 3\.10 to 3\.13"):
        converted(nn.ReLU(), ct.target.iOS18, tmp_path / "blob")


def test_other_failures_pass_as_they_are() -> None:
    program = exported(nn.ReLU())
    for error in (ValueError("something else"), UnsupportedError("ours: BlobWriter not loaded")):
        with pytest.raises(type(error), match=str(error)), advised(program, "iOS18"):
            raise error
    told = "The palettization with per-channel-scale is only supported in iOS18+. Please set"
    with (
        pytest.raises(UnsupportedError, match=r"begins with iOS18.*give --minimum-os iOS18"),
        advised(program, "iOS17"),
    ):
        raise ValueError(told)


@pytest.mark.parametrize("target", [ct.target.iOS16, ct.target.iOS17, ct.target.iOS26])
def test_a_program_is_written_for_its_system(target: Any, tmp_path: Path) -> None:
    model = converted(nn.ReLU(), target, tmp_path / "blob")
    assert model.specification_version == target.value
    assert {each.opset for each in model.functions.values()} == {ct._OPSET[target.value]}


def test_what_a_system_would_refuse_is_refused(tmp_path: Path) -> None:
    topk = Of(lambda x: torch.topk(x, 3, sorted=False)[0])
    model, program = converted(topk, ct.target.iOS18, tmp_path / "blob"), exported(topk)
    with pytest.raises(UnsupportedError, match=r"version 9 .* CoreML8, and iOS17 reads version 8"):
        check_systems(model, program, "iOS17")
    function = model.functions["main"]
    claimed = {"main": replace(function, opset="CoreML5")}
    older = replace(model, specification_version=6, functions=claimed)
    with pytest.raises(
        UnsupportedError, match=r"needs topk \('.*' in 1\), which begins with iOS17"
    ):
        check_systems(replace(older, interfaces={}), program, "iOS15")
