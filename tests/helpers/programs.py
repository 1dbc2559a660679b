"""Builds Core ML programs with coremltools and runs them, many cases in one program.

A case is built twice: from constants, where coremltools infers the value, and from inputs, where
the reference has to compute it.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from llm_coreml.reference import CoreMLProgram, load
from shared import Shared

DTYPES = {
    np.dtype(np.float32): types.fp32,
    np.dtype(np.float16): types.fp16,
    np.dtype(np.int32): types.int32,
    np.dtype(np.bool_): types.int32,
}


@dataclass(frozen=True, eq=False)
class Case:
    """An operation under test: how to build it, its inputs, and what it gives if not inferred."""

    name: str
    build: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]
    expected: Callable[..., Any] | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    actual: list[np.ndarray]
    expected: list[np.ndarray]


def save(program: Program, path: Path, target: Any) -> None:
    """Write `program` as a `.mlpackage` without optimizing it."""
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))


def build_program(
    inputs: dict[str, Any], body: Callable[[dict[str, Any]], Sequence[Any]], target: Any
) -> Program:
    """Return a program whose function `main` is given by `body`."""
    program = Program()
    with Function(inputs=inputs, opset_version=target) as function:
        variables = dict(function.inputs)
        function.set_outputs([_output(at, var) for at, var in enumerate(body(variables))])
    program.add_function("main", function)
    return program


def _output(number: int, var: Any) -> Any:
    if var.dtype not in (types.fp16, types.fp32, types.int32):
        var = mb.cast(x=var, dtype="int32")
    if var.rank == 0:
        var = mb.expand_dims(x=var, axes=[0])
    return mb.identity(x=var, name=f"out_{number}")


def run_cases(
    cases: Sequence[Case], path: Path, target: Any = ct.target.iOS18
) -> dict[str, Outcome]:
    """Build all cases into one program, run it, and pair the results with what is expected."""
    inputs, feeds = {}, {}
    for number, case in enumerate(cases):
        for place, array in enumerate(case.arrays):
            name = f"in_{number}_{place}"
            inputs[name] = mb.placeholder(shape=array.shape, dtype=DTYPES[array.dtype])
            feeds[name] = torch.from_numpy(array.astype(np.int32) if array.dtype == bool else array)
    expected: list[list[np.ndarray]] = []

    def body(variables: dict[str, Any]) -> list[Any]:
        outputs: list[Any] = []
        for number, case in enumerate(cases):
            if case.expected is None:
                inferred = _tuple(case.build(*(mb.const(val=array) for array in case.arrays)))
                assert all(var.val is not None for var in inferred), f"{case.name} is not inferred"
                expected.append([np.asarray(var.val) for var in inferred])
            else:
                expected.append([np.asarray(item) for item in _tuple(case.expected(*case.arrays))])
            given = []
            for place, array in enumerate(case.arrays):
                var = variables[f"in_{number}_{place}"]
                given.append(mb.cast(x=var, dtype="bool") if array.dtype == bool else var)
            outputs += _tuple(case.build(*given))
        return outputs

    save(build_program(inputs, body, target), path, target)
    results = load(path)(feeds)
    outcomes, at = {}, 0
    for case, wanted in zip(cases, expected, strict=True):
        actual = [results[f"out_{at + place}"].numpy() for place in range(len(wanted))]
        at += len(wanted)
        shaped = [
            value.reshape(()) if want.ndim == 0 else value
            for value, want in zip(actual, wanted, strict=True)
        ]
        outcomes[case.name] = Outcome(shaped, wanted)
    return outcomes


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def check(outcome: Outcome, rtol: float = 2e-6, atol: float = 2e-6) -> None:
    """Compare shapes and values; integers and bools must be equal."""
    for actual, expected in zip(outcome.actual, outcome.expected, strict=True):
        assert actual.shape == expected.shape
        if actual.dtype.kind == "f":
            np.testing.assert_allclose(actual, expected.astype(actual.dtype), rtol, atol)
        else:
            np.testing.assert_array_equal(actual, expected.astype(actual.dtype))


@pytest.fixture(scope="session")
def harness() -> Any:
    """The functions above, for test modules, which cannot import this file."""
    return Harness


class Harness:
    Case = Case
    run_cases = staticmethod(run_cases)
    check = staticmethod(check)
    save = staticmethod(save)
    build_program = staticmethod(build_program)


@pytest.fixture
def load_program(tmp_path: Path) -> Iterator[Callable[..., CoreMLProgram]]:
    """Build, save and load a program; `body` maps input variables to output variables."""

    def build(
        inputs: dict[str, Any],
        body: Callable[[dict[str, Any]], Sequence[Any]],
        target: Any = ct.target.iOS18,
    ) -> CoreMLProgram:
        path = tmp_path / "model.mlpackage"
        save(build_program(inputs, body, target), path, target)
        return load(path)

    yield build


@pytest.fixture
def bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that takes long, much memory, or writes where nobody asked it to."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setattr(tempfile, "tempdir", str(empty))
    start, peak = time.monotonic(), _peak()
    yield
    assert time.monotonic() - start < 15
    assert _peak() - peak < 1 << 29
    assert not list(empty.iterdir())


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Counter(torch.nn.Module):
    """Adds what it sees to a state, as a cache would; takes what a language model takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("total", torch.zeros(1, 3, 8))
        self.embedding = torch.nn.Embedding(9, 8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens.to(torch.int32)) + start_pos.to(torch.int32)
        self.total.add_(hidden)
        return self.head(self.total)


class Pair(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.relu(x + 1).flip(0) + 1)


def _lower(
    path: Path, module: torch.nn.Module, arguments: tuple[Any, ...], *, inline: bool, skip: Any
) -> None:
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    specs = CoreMLBackend.generate_compile_specs(minimum_deployment_target=ct.target.iOS18)
    partitioner = CoreMLPartitioner(compile_specs=specs, skip_ops_for_coreml_delegation=skip)
    edge = to_edge_transform_and_lower(
        torch.export.export(module.eval(), arguments),
        partitioner=[partitioner],
        constant_methods={
            "get_max_seq_len": 16,
            "get_eos_ids": [1, 2],
            "use_kv_cache": True,
            "get_scale": 1.5,
            "get_zero": 0,
        },
    )
    settings = ExecutorchBackendConfig(extract_delegate_segments=not inline)
    path.write_bytes(edge.to_executorch(settings).buffer)


def _pair(path: Path, *, inline: bool, skip: Any) -> None:
    _lower(path, Pair(), (torch.zeros(2),), inline=inline, skip=skip)


@pytest.fixture(scope="session")
def sample_pte(shared: Shared) -> Path:
    """A stateful method `forward(tokens int64 [1, 3], start_pos int64 [1])`, data inline."""
    arguments = (torch.tensor([[1, 2, 3]]), torch.tensor([0]))
    skip = ["aten._to_copy.default", "dim_order_ops._to_dim_order_copy.default"]
    return shared.file(
        "sample.pte", [], lambda path: _lower(path, Counter(), arguments, inline=True, skip=skip)
    )


@pytest.fixture(scope="session")
def segmented_pte(shared: Shared) -> Path:
    """As `sample_pte`, with the delegate's data in a segment behind the program."""
    return shared.file("segmented.pte", [], lambda path: _pair(path, inline=False, skip=None))


@pytest.fixture(scope="session")
def portable_pte(shared: Shared) -> Path:
    """Two Core ML delegates with a kernel between them."""
    skip = ["aten.flip.default"]
    return shared.file("portable.pte", [], lambda path: _pair(path, inline=True, skip=skip))


@pytest.fixture(scope="session")
def two_segments_pte(shared: Shared) -> Path:
    """As `portable_pte`, with each delegate's data in a segment of its own."""
    skip = ["aten.flip.default"]
    return shared.file("two_segments.pte", [], lambda path: _pair(path, inline=False, skip=skip))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(8, 8)
        self.outer = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(x)))


@pytest.fixture(scope="session")
def shared_pte(shared: Shared) -> Path:
    """Two methods, of 1 row and of 4, whose Core ML model lies once in the file."""
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.exir import to_edge_transform_and_lower

    # That they share one is ExecuTorch's default.
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32
    )
    rows = {"decode": 1, "prefill": 4}

    def write(path: Path) -> None:
        layer = Layer().eval().requires_grad_(False)
        edge = to_edge_transform_and_lower(
            {name: torch.export.export(layer, (torch.zeros(n, 8),)) for name, n in rows.items()},
            partitioner={name: [CoreMLPartitioner(compile_specs=specs)] for name in rows},
        )
        path.write_bytes(edge.to_executorch().buffer)

    return shared.file("shared.pte", [], write)


@pytest.fixture(scope="session")
def xnnpack_pte(shared: Shared) -> Path:
    """A method lowered for another backend."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    def write(path: Path) -> None:
        exported = torch.export.export(torch.nn.Linear(2, 3).eval(), (torch.zeros(1, 2),))
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        path.write_bytes(edge.to_executorch().buffer)

    return shared.file("xnnpack.pte", [], write)
