"""Whole modules lowered by ExecuTorch: blocks, states, quantized weights, shapes, kernels between.

All in fp32, where only the order of sums differs from eager torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coremltools as ct
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import cases
from llm_coreml.artifact.pte import read
from llm_coreml.errors import ArtifactError
from llm_coreml.reference import LoadedMethod, load_method
from lowering import lower, specs
from samples import made, uniform

# torch.export says so of its own recurrent layers.
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during")

FP32 = 2e-6
WIDTH = 32
# A partition is one delegate; these operations are left outside.
SKIP_MM = {"skip_ops_for_coreml_delegation": ["aten.mm.default"]}

Tensor = torch.Tensor


class Wrapped(nn.Module):
    """Calls a layer with its own way of being called."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.layer, *inputs)


class Residual(nn.Module):
    """A block of an image network: convolutions, norms, a squeeze-and-excite gate, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = made(nn.Conv2d, 4, 8, 1, bias=False)
        self.deep = made(nn.Conv2d, 8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = made(nn.BatchNorm2d, 8)
        self.gate = made(nn.Linear, 8, 8)
        self.back = made(nn.Conv2d, 8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.relu6(self.norm(self.deep(F.silu(self.spread(image)))))
        gate = torch.sigmoid(self.gate(hidden.mean((2, 3))))
        return image + self.back(hidden * gate[:, :, None, None])


class Patches(nn.Module):
    """A vision transformer of one layer: patches, a class token, positions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = made(nn.Conv2d, 3, WIDTH, 4, stride=4)
        self.first = nn.Parameter(uniform(1, 1, WIDTH))
        self.places = nn.Parameter(uniform(1, 5, WIDTH))
        self.layer = made(
            nn.TransformerEncoderLayer, WIDTH, 4, 48, activation="gelu", batch_first=True
        )
        self.head = made(nn.Linear, WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        rows = self.patch(image).flatten(2).mT
        rows = torch.cat([self.first.expand(len(rows), -1, -1), rows], 1) + self.places
        return self.head(self.layer(rows)[:, 0])


class Rotary(nn.Module):
    """RMS norm written out, RoPE by halves, causal attention, a gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = made(nn.Linear, WIDTH, 3 * WIDTH, bias=False)
        self.gates = made(nn.Linear, WIDTH, 2 * WIDTH, bias=False)
        angles = torch.outer(torch.arange(6.0), 100 ** -(torch.arange(4) / 4.0))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat(
            [left * self.cos - right * self.sin, right * self.cos + left * self.sin], -1
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        query, key, value = self.mixed(normed).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        query, key = self.turn(query), self.turn(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        left, right = self.gates(x + mixed.transpose(1, 2).flatten(2)).chunk(2, -1)
        return F.silu(left) * right, key


class Cache(nn.Module):
    """Writes a slice and a computed place of two buffers, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.zeros(1, 6, 4))
        self.register_buffer("table", torch.zeros(8, 4))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        self.window[:, :-2] = self.window[:, 2:].clone()
        self.window[:, -2:] = x
        self.table.index_put_((place,), x[0])
        self.calls.add_(1)
        return self.window.cumsum(1) * self.calls, self.table @ x[0].T


class Broken(nn.Module):
    """Products that stay outside of Core ML, and work for it before, between and after."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.mm(x + y, y - 1)
        second = torch.mm(torch.relu(first) * 2, x)
        return torch.tanh(second) + x, first


class Tokens(nn.Module):
    """A table and two linear layers, for quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.table = made(nn.Embedding, 48, 64)
        self.inner = made(nn.Linear, 64, 96)
        self.outer = made(nn.Linear, 96, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(self.table(tokens))))


@dataclass(frozen=True, eq=False)
class Case:
    """A module to lower.

    Attributes:
        module: makes it.
        inputs: of each call, the first one's shapes being exported.
        options: of the partitioner.
        outside: the kernels that the plan must run itself.
        target: the oldest system that it is for.
    """

    module: Callable[[], nn.Module]
    inputs: tuple[tuple[Tensor, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    outside: frozenset[str] = frozenset()
    target: Any = ct.target.iOS18


def quantized(**settings: Any) -> Callable[[], nn.Module]:
    """Return a maker of `Tokens` with the given torchao configurations of linear and table."""

    def make() -> nn.Module:
        from torchao.quantization import quantize_

        module = Tokens()
        for kind, config in ((nn.Linear, "linear"), (nn.Embedding, "table")):
            if config in settings:
                # Called late, since torchao is slow to import.
                quantize_(
                    module, settings[config](), lambda m, name, kind=kind: isinstance(m, kind)
                )
        return module

    return make


def whole(bits: int, group: int | None = None) -> Callable[[], Any]:
    """Integer weights with one scale per row, or per group of a row."""

    def config() -> Any:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup

        granularity = PerGroup(group) if group else PerAxis(0)
        return IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity)

    return config


def codebook(bits: int, *block: int) -> Callable[[], Any]:
    def config() -> Any:
        from torchao.prototype.quantization.codebook_coreml import CodebookWeightOnlyConfig

        return CodebookWeightOnlyConfig(getattr(torch, f"uint{bits}"), list(block))

    return config


ROWS = ((uniform(2, 6, WIDTH),),)
TOKENS = ((torch.tensor([[5, 0, 47]]),),)
SQUARES = ((uniform(4, 4), uniform(4, 4, seed=1)),)
WRITES = tuple((uniform(1, 2, 4, seed=seed), torch.tensor([seed, 7 - seed])) for seed in range(3))
CASES: dict[str, Case] = {
    "lstm": Case(
        lambda: Wrapped(made(nn.LSTM, WIDTH, 8, batch_first=True), lambda m, x: m(x)[0]), ROWS
    ),
    "gru": Case(
        lambda: Wrapped(made(nn.GRU, WIDTH, 8, batch_first=True), lambda m, x: m(x)[0]), ROWS
    ),
    "attention": Case(
        lambda: Wrapped(
            made(nn.MultiheadAttention, WIDTH, 4, batch_first=True), lambda m, x: m(x, x, x)
        ),
        ROWS,
    ),
    "encoder": Case(
        lambda: made(nn.TransformerEncoderLayer, WIDTH, 4, 48, batch_first=True), ROWS
    ),
    "rotary": Case(Rotary, ROWS),
    "residual": Case(Residual, ((uniform(2, 4, 8, 8),),)),
    "patches": Case(Patches, ((uniform(2, 3, 8, 8),),)),
    "states": Case(Cache, WRITES),
    "buffers of the plan": Case(Cache, WRITES, {"take_over_mutable_buffer": False}),
    "products outside": Case(Broken, SQUARES, SKIP_MM, frozenset({"aten::mm.out"})),
    "constants outside": Case(
        Residual, ((uniform(2, 4, 8, 8),),), {"take_over_constant_data": False}
    ),
    "int4 groups": Case(quantized(linear=whole(4, 32)), TOKENS),
    "int4 rows": Case(quantized(linear=whole(4), table=whole(4)), TOKENS),
    "int4 groups everywhere": Case(quantized(linear=whole(4, 32), table=whole(4, 16)), TOKENS),
    "int8 table": Case(quantized(linear=whole(4, 32), table=whole(8)), TOKENS),
    "int8 before iOS 18": Case(
        quantized(linear=whole(8), table=whole(8)), TOKENS, target=ct.target.iOS16
    ),
    "codebook of columns": Case(quantized(linear=codebook(2, -1, 16)), TOKENS),
    "codebook of rows": Case(quantized(linear=codebook(3, 16, -1)), TOKENS),
    "codebook table": Case(quantized(table=codebook(4, -1, 16)), TOKENS),
}  # fmt: skip


def check(method: LoadedMethod, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    results = method.run(*inputs)
    with torch.no_grad():
        expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for actual, value in zip(results, expected, strict=True):
        atol = FP32 * float(value.abs().max())
        torch.testing.assert_close(actual, value, rtol=0, atol=atol)


def kernels(path: Path) -> set[str]:
    instructions = read(path).methods["forward"].instructions
    return {item.target for item in instructions if item.kind == "kernel"}


# Loops and groups are those of another case as well.
@pytest.mark.parametrize("name", cases(CASES, {"gru", "int4 groups"}))
def test_modules(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module = case.module().eval()
    path = lower(
        module,
        case.inputs[0],
        specs(ct.precision.FLOAT32, case.target),
        tmp_path / "module.pte",
        **case.options,
    )
    assert case.outside <= kernels(path)
    method = load_method(path)
    for _ in range(2):
        fresh = case.module().eval()
        for inputs in case.inputs:
            check(method, fresh, inputs)
        method.reset()


def linears() -> nn.Module:
    return Wrapped(
        nn.ModuleList([made(nn.Linear, 6, 5), made(nn.Linear, 7, 5)]),
        lambda both, x, y: both[0](x).sum() + both[1](y),
    )


def of_sizes(batch: int, length: int, rows: int) -> tuple[Tensor, Tensor]:
    return uniform(batch, length, 6), uniform(rows, 7)


def test_ranges_of_shapes(tmp_path: Path) -> None:
    module = linears()
    length = torch.export.Dim("length", min=2, max=9)
    path = lower(
        module,
        of_sizes(2, 4, 3),
        specs(ct.precision.FLOAT32),
        tmp_path / "ranges.pte",
        dynamic_shapes=(({1: length}, {0: torch.export.Dim("rows", min=2, max=5)}),),
    )
    method = load_method(path)
    for inputs in (of_sizes(2, 4, 3), of_sizes(2, 9, 2), of_sizes(2, 2, 5)):
        check(method, module, inputs)
    with pytest.raises(ArtifactError, match=r"shape \[2, 10, 6\]"):
        method.run(*of_sizes(2, 10, 3))


def enumerated(tmp_path: Path) -> tuple[LoadedMethod, nn.Module]:
    from executorch.backends.apple.coreml.compiler import CoreMLBackend

    module, auto = linears().eval(), torch.export.Dim.AUTO
    exported = torch.export.export(
        module,
        of_sizes(4, 6, 5),
        dynamic_shapes=(({0: auto(min=1, max=4), 1: auto(min=5, max=6)}, {0: auto(min=3, max=5)}),),
    )
    shapes = {"inputs_0": [[1, 5, 6], [4, 6, 6]], "inputs_1": [[3, 7], [5, 7]]}
    chosen = CoreMLBackend.generate_enumerated_shapes_compile_spec(exported, shapes)
    path = lower(
        exported,
        (),
        [*specs(ct.precision.FLOAT32), chosen],
        tmp_path / "enumerated.pte",
        lower_full_graph=True,
    )
    return load_method(path), module


def test_enumerated_shapes(tmp_path: Path) -> None:
    method, module = enumerated(tmp_path)
    for inputs in (of_sizes(1, 5, 3), of_sizes(4, 6, 5)):
        check(method, module, inputs)
    for inputs in (of_sizes(4, 5, 3), of_sizes(1, 5, 5)):
        with pytest.raises(ArtifactError, match="enumerated"):
            method.run(*inputs)


class Rounded(nn.Module):
    """What the quantization of an exported graph leaves: activations and weights of 8 bits.

    It is written down, since coremltools' quantizer for exported graphs takes minutes.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("conv", (4, 3, 3, 3)), ("linear", (5, 64))):
            weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
            self.register_buffer(f"{name}_weight", weight)
            self.register_buffer(f"{name}_scale", uniform(shape[0], low=0.001, high=0.002))
            self.register_buffer(f"{name}_zero", torch.zeros(shape[0], dtype=torch.int64))

    def weight(self, name: str) -> Tensor:
        values = (getattr(self, f"{name}_{part}") for part in ("weight", "scale", "zero"))
        ops = torch.ops.quantized_decomposed
        return ops.dequantize_per_channel(*values, 0, -128, 127, torch.int8)

    def rounded(self, x: Tensor, scale: float, zero: int) -> Tensor:
        ops, settings = torch.ops.quantized_decomposed, (scale, zero, 0, 255, torch.uint8)
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *settings), *settings)

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.conv2d(self.rounded(image, 1 / 100, 128), self.weight("conv"))
        hidden = self.rounded(F.relu(hidden), 0.005, 0).flatten(1)
        return self.rounded(F.linear(hidden, self.weight("linear")), 0.02, 120)


def test_quantized_activations(tmp_path: Path) -> None:
    import torchao.quantization.pt2e  # noqa: F401  registers the operations

    module, inputs = Rounded(), (uniform(2, 3, 6, 6),)
    path = lower(
        module, inputs, specs(ct.precision.FLOAT32, ct.target.iOS17), tmp_path / "rounded.pte"
    )
    method = load_method(path)
    for seed in range(3):
        check(method, module, (uniform(2, 3, 6, 6, seed=seed),))
