"""Whole methods: shared models, kernels outside of Core ML, the plan's memory and its branches.

ExecuTorch's own runtime is the judge wherever no Core ML delegate takes part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import pytest
import torch
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.backends.apple.coreml.partition import CoreMLPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass
from executorch.runtime import Runtime

from llm_coreml.artifact import milproto, packages, pte
from llm_coreml.artifact.packages import Packages
from llm_coreml.errors import ArtifactError
from llm_coreml.inspect.contents import contents
from llm_coreml.reference import load, load_method, load_methods
from llm_coreml.reference.method.kernels import IN_PLACE, KERNELS, OPERATORS
from llm_coreml.reference.method.method import LoadedMethod
from llm_coreml.reference.program.execution import Execution
from programs import Layer


def partitioner(*skip: str, states: bool = True) -> CoreMLPartitioner:
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32
    )
    return CoreMLPartitioner(
        compile_specs=specs,
        skip_ops_for_coreml_delegation=list(skip),
        take_over_mutable_buffer=states,
    )


def export(module: torch.nn.Module, *arguments: torch.Tensor, **settings: Any) -> Any:
    return torch.export.export(module.eval().requires_grad_(False), arguments, **settings)


def without_delegates(path: Path) -> LoadedMethod:
    container = pte.read(path)
    return LoadedMethod(container.methods["forward"], Packages(container), Execution().pool(), {})


def assert_as_executorch(
    module: torch.nn.Module,
    calls: list[tuple[torch.Tensor, ...]],
    path: Path,
    rtol: float = 0.0,
    **settings: Any,
) -> LoadedMethod:
    """Run `module` through ExecuTorch's kernels and through ours, and compare."""
    initialized = [name for name, _ in module.named_buffers() if name.startswith("initial")]
    config = ExecutorchBackendConfig(passes=[InitializedMutableBufferPass(initialized)])
    edge = to_edge_transform_and_lower(export(module, *calls[0], **settings))
    path.write_bytes(edge.to_executorch(config).buffer)
    ours = without_delegates(path)
    theirs = Runtime.get().load_program(path).load_method("forward")
    assert theirs is not None
    for arguments in calls:
        expected = [value.clone() for value in theirs.execute(arguments)]
        actual = ours.run(*arguments)
        assert len(actual) == len(expected)
        for mine, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol, equal_nan=True)
    return ours


@pytest.mark.parametrize(("name", "rows"), [("decode", 1), ("prefill", 4)])
def test_each_method_runs_its_function(name: str, rows: int, shared_pte: Path) -> None:
    method = load_method(shared_pte, name)
    assert [program.function_name for program in method.programs] == [name]
    x = torch.randn(rows, 8)
    torch.testing.assert_close(method(x), Layer()(x).detach())
    (result,) = load(shared_pte, name)({"x": x}).values()
    torch.testing.assert_close(result, Layer()(x).detach())


def test_shared_model_is_parsed_once(shared_pte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []

    def parse(*arguments: Any) -> Any:
        parsed.append(milproto.parse(*arguments))
        return parsed[-1]

    monkeypatch.setattr(packages, "parse", parse)
    methods = load_methods(shared_pte)
    assert len(parsed) == 1
    functions = [item.programs[0].function_name for item in methods.values()]
    assert functions == list(methods) == ["decode", "prefill"]


def test_shared_model_is_described(shared_pte: Path) -> None:
    program = load(shared_pte)
    assert program.function_name == "decode"
    assert program.function_names == ("decode", "prefill")
    described = contents(shared_pte).to_json()["methods"]
    assert {name: item["inputs"] for name, (item,) in described.items()} == {
        "decode": {"x": "fp32 [1, 8]"},
        "prefill": {"x": "fp32 [4, 8]"},
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"key": "coreml', b'"key": "morecl', r"model 'morecl.*does not hold.*\.ptd"),
        (b'"key"', b'"kee"', "unreadable way"),
        (b'CMJR{"version"', b'CMJR["version"', "unreadable way"),
        (b'"functionName": "prefill"', b'"functionName": "prefull"', "mean 'prefill'"),
        (b'"functionName": "prefill"', b'"functionName": 12345678 ', "no name"),
        (b'"functionName"', b'"functionNome"', "does not say which function"),
        (b'"prefill": {"inputNames"', b'"prefull": {"inputNames"', "without the method 'prefill'"),
        (b'"inputNames"', b'"inputNumes"', "the list of names 'inputNames'"),
    ],
)
def test_broken_references_are_refused(
    old: bytes, new: bytes, message: str, shared_pte: Path, tmp_path: Path
) -> None:
    content = shared_pte.read_bytes()
    assert old in content and len(old) == len(new)
    path = tmp_path / "broken.pte"
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ArtifactError, match=message):
        load_method(path, "prefill")


class Buffered(torch.nn.Module):
    """Keeps a cache outside of Core ML, between two parts that Core ML runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 6, 4))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.cache[:, at] = torch.relu(x) * 2
        return torch.sigmoid(self.cache.sum(1) + 1)


def test_buffers_of_the_plan_live_until_reset(tmp_path: Path) -> None:
    path = tmp_path / "buffered.pte"
    part = partitioner("aten.index_put.default", "aten.copy_.default", states=False)
    arguments = (torch.randn(1, 1, 4), torch.tensor([2]))
    edge = to_edge_transform_and_lower(export(Buffered(), *arguments), partitioner=[part])
    path.write_bytes(edge.to_executorch().buffer)
    method = load_method(path)
    assert len(method.programs) == 2
    for _ in range(2):
        eager = Buffered().eval()
        for at in (2, 0, 5, 2):
            x, place = torch.randn(1, 1, 4), torch.tensor([at])
            torch.testing.assert_close(method(x, place), eager(x, place))
        method.reset()


class Mover(torch.nn.Module):
    """What moves data, reads and changes buffers, and makes tensors from nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(9, 4)
        self.register_buffer("cache", torch.zeros(1, 8, 4))
        self.register_buffer("initial", torch.arange(4.0))
        self.register_buffer("table", torch.randn(8, 4))

    def forward(self, tokens: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
        start = at.item()
        torch._check(start >= 0)
        torch._check(start < 8)
        row = self.table.narrow(0, start, 1)
        self.cache[:, at] = self.embedding(tokens)
        self.initial.add_(1.0)
        keys = self.cache.permute(0, 2, 1).unsqueeze(1)[:, :, :2].squeeze(1)
        wide = torch.cat([keys, keys * 2], 1).view(1, -1, 8)
        chosen = torch.where(wide > 0, wide, torch.zeros_like(wide)) + torch.arange(8) - 1.5
        picked = chosen.expand(3, -1, -1).clone().index_select(1, at % 4)
        parts = wide.split(2, 1)
        return (
            picked + self.initial[0] + row.sum(),
            picked.argmax(-1),
            self.cache[:, torch.tensor([0, 2])].to(torch.float16),
            self.cache[0],
            picked.reshape(3, 8).flip(0).tril(),
            torch.stack([parts[0], parts[1]]).repeat(1, 2, 1, 1).transpose(1, 3),
            torch.nn.functional.pad(row, (1, 2), value=2.5).gather(1, tokens % 4),
            (picked * 3).to(torch.int32),
            row.masked_fill(row > 0, 3.0),
        )


def test_data_moves_as_in_executorch(tmp_path: Path) -> None:
    calls = [
        (torch.tensor([[token]]), torch.tensor([at]))
        for token, at in ((3, 2), (4, 0), (8, 7), (1, 2))
    ]
    method = assert_as_executorch(Mover(), calls, tmp_path / "mover.pte")
    first = method.run(*calls[0])
    method.reset()
    fresh = Mover()(*calls[0])
    for mine, other in zip(method.run(*calls[0]), fresh, strict=True):
        torch.testing.assert_close(mine, other.detach())
    assert not torch.equal(first[3], fresh[3])


class Arithmetic(torch.nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + 2 * x - 1.5 / (x.abs() + 1)
        return (
            y,
            torch.clamp(y, -0.5, 0.5),
            torch.maximum(x, y) - torch.minimum(x, -y),
            1 - x,
            x.neg().relu(),
            x**2,
            torch.reciprocal(x),
            (x > y) & (x <= 0.5) | ~(x == y),
            torch.logical_and(x >= 0, y < 1).logical_not(),
            (n % 3) * 2 - n,
            n % -n.abs().clamp(min=1),
            x % 0.7,
            n >= 4,
            n != 4,
            torch.full((2, 3), 7) + torch.arange(1, 7, 2),
            n.argmin(-1),
            x.amax(-1, keepdim=True),
            n.cumsum(0),
        )


def test_arithmetic_is_executorchs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    calls = [(torch.randn(3, 5), torch.randint(-9, 9, (3, 4))) for _ in range(3)]
    assert_as_executorch(Arithmetic(), calls, tmp_path / "arithmetic.pte")


class Rounded(torch.nn.Module):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, ...]:
        norm = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (
            norm,
            torch.sqrt(x.abs()),
            n.to(torch.float32) / 3,
            torch.softmax(norm @ x.t(), -1),
            torch.sigmoid(x) * torch.tanh(x) + torch.exp(-x.abs()).log(),
            torch.cos(x).cumsum(-1) + torch.sin(x).sum(-1, keepdim=True),
            *torch.topk(x, 2),
        )


def test_rounding_differs_in_the_last_bits_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    calls = [(torch.randn(3, 5), torch.randint(-9, 9, (3, 4))) for _ in range(3)]
    assert_as_executorch(Rounded(), calls, tmp_path / "rounded.pte", rtol=1e-6)


class Sized(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x.shape[0]
        flat = x.reshape(rows * 4)
        return flat * 2, x[1:].reshape(-1), torch.full((rows * 3 + 1,), 2.0), x.view(-1, 2)


def test_sizes_are_computed(tmp_path: Path) -> None:
    calls = [(torch.randn(rows, 4),) for rows in (6, 3, 9, 4)]
    method = assert_as_executorch(
        Sized(),
        calls,
        tmp_path / "sized.pte",
        dynamic_shapes={"x": {0: torch.export.Dim("rows", min=3, max=10)}},
    )
    with pytest.raises(ArtifactError, match=r"shape \[11, 4\]; the plan says at most \[10, 4\]"):
        method.run(torch.zeros(11, 4))


class Branching(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,)) - 3


def test_branches(tmp_path: Path) -> None:
    calls = [(torch.full((3,), value),) for value in (1.0, -1.0, 2.0)]
    assert_as_executorch(Branching(), calls, tmp_path / "branching.pte")


@pytest.mark.parametrize("name", sorted(OPERATORS | IN_PLACE))
def test_every_listed_kernel_is_torchs(name: str) -> None:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    schema = getattr(getattr(torch.ops.aten, packet), overload or "default")._schema
    changed = [item for item in schema.arguments if item.alias_info is not None]
    assert all(item.is_out for item in changed) != (name in IN_PLACE)
    assert changed
    assert name in KERNELS
