"""What a caller chooses and what it must not change: budget, shapes, fusion, snapshots, names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import get_new_symbol, types
from coremltools.proto import Model_pb2

from llm_coreml.artifact.packages import model_of_folder
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.reference import CoreMLProgram, Execution, load
from llm_coreml.reference.program import compiler as compiler_module
from llm_coreml.reference.program import coreml_program as program_module
from llm_coreml.reference.program.constants import PackedWeight, expanded, rows, unit, whole
from llm_coreml.reference.program.numerics import numerics

ROWS, WIDTH = 640, 128
RNG = np.random.default_rng(3)
INT4 = RNG.integers(-8, 8, (ROWS, WIDTH)).astype(types.nptype_from_builtin(types.int4))
SCALE = RNG.uniform(0.01, 0.02, (ROWS, WIDTH // 32)).astype(np.float16)
TABLE = RNG.standard_normal((ROWS // 16, 1, 8, 1)).astype(np.float16)
INDICES = RNG.integers(0, 8, (ROWS, WIDTH)).astype(types.nptype_from_builtin(types.uint3))
DENSE = RNG.standard_normal((ROWS, WIDTH)).astype(np.float16)


def weights() -> dict[str, Any]:
    return {
        "int4": mb.constexpr_blockwise_shift_scale(data=INT4, scale=SCALE),
        "lut3": mb.constexpr_lut_to_dense(indices=INDICES, lut=TABLE),
        "dense": mb.const(val=DENSE),
    }


def large(variables: dict[str, Any]) -> list[Any]:
    """Each weight looked up, multiplied with, and used by an operation that knows no packing."""
    results = []
    bias = np.arange(ROWS, dtype=np.float16)
    for weight in weights().values():
        hidden = mb.gather(x=weight, indices=variables["at"], axis=0)
        logits = mb.linear(x=hidden, weight=weight, bias=bias)
        results += [hidden, logits, mb.reduce_sum(x=weight, axes=[0])]
    return results


@pytest.fixture(scope="module")
def large_path(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model.mlpackage"
    inputs = {"at": mb.placeholder(shape=(7,), dtype=types.int32)}
    harness.save(harness.build_program(inputs, large, ct.target.iOS18), path, ct.target.iOS18)
    return path


AT = torch.tensor([0, 3, 639, -1, 16, 15, 3], dtype=torch.int32)


def packed_in(program: CoreMLProgram) -> int:
    return sum(isinstance(value, PackedWeight) for value in program._compiled.initial)


@pytest.mark.parametrize("mode", ["declared", "fp32", "strict-fp16"])
def test_budget_changes_no_result(large_path: Path, mode: str) -> None:
    free = load(large_path, execution=Execution(mode=mode))
    tight = load(large_path, execution=Execution(mode=mode, memory_budget=0))
    assert packed_in(free) == 0
    assert packed_in(tight) >= 3
    for _ in range(2):
        expected, actual = free(at=AT), tight(at=AT)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=2e-3, atol=1e-3)


def test_budget_is_kept(large_path: Path) -> None:
    """With room for one weight as fp16 and as fp32, no other is expanded."""
    one = ROWS * WIDTH * (2 + 4)
    tight = load(large_path, execution=Execution(memory_budget=0))
    program = load(large_path, execution=Execution(memory_budget=one))
    assert packed_in(tight) == 3 * 2
    assert packed_in(program) == 2 * 2
    with pytest.raises(ArtifactError, match="index 640 of 640"):
        program(at=torch.full((7,), ROWS, dtype=torch.int32))


def test_a_large_bias_leaves_its_weight_in_slices(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of a large vocabulary has a bias that is packed too."""
    count, width = 70_000, 2
    weight = RNG.standard_normal((count, width)).astype(np.float16)
    bias = (np.arange(count) % 1000).astype(np.float16)

    def head(variables: dict[str, Any]) -> list[Any]:
        return [mb.linear(x=variables["x"], weight=weight, bias=bias)]

    path = tmp_path / "model.mlpackage"
    inputs = {"x": mb.placeholder(shape=(3, width), dtype=types.fp16)}
    harness.save(harness.build_program(inputs, head, ct.target.iOS18), path, ct.target.iOS18)
    program = load(path, execution=Execution(mode="fp32", memory_budget=0))
    assert packed_in(program) == 2
    in_full: list[tuple[int, ...]] = []
    expand = PackedWeight.expand
    monkeypatch.setattr(
        PackedWeight, "expand", lambda packed: (in_full.append(packed.shape), expand(packed))[1]
    )
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float16)
    (given,) = program(x=x).values()
    expected = x.double() @ torch.from_numpy(weight).double().T + torch.from_numpy(bias).double()
    torch.testing.assert_close(given.double(), expected, rtol=1e-6, atol=1e-6)
    assert in_full == [(count,)]


def test_expansion_by_rows_equals_the_whole(large_path: Path) -> None:
    tight = load(large_path, execution=Execution(memory_budget=0))
    found = [value for value in tight._compiled.initial if isinstance(value, PackedWeight)]
    declared = numerics("declared")
    for packed in found:
        source, step = packed.source, unit(packed.source)
        parts = [
            rows(source, start, min(start + 3 * step, ROWS), declared)
            for start in range(0, ROWS, 3 * step)
        ]
        torch.testing.assert_close(torch.cat(parts), whole(source, declared), rtol=0, atol=0)
        wide = expanded(source, declared, wide=True)
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide.half().float(), wide, rtol=0, atol=0)
    assert {unit(packed.source) for packed in found} == {1, 8, 16}


def lengths(variables: dict[str, Any]) -> list[Any]:
    """Sizes computed from the input's shape, and one from data."""
    x = variables["x"]
    size = mb.slice_by_index(x=mb.shape(x=x), begin=[1], end=[2])
    target = mb.concat(values=[size, np.array([2, -1], np.int32)], axis=0)
    folded = mb.reshape(x=x, shape=target)
    chosen = mb.slice_by_size(x=x, begin=np.array([0, 0], np.int32), size=variables["size"])
    return [folded, mb.mul(x=size, y=np.int32(2)), mb.reduce_sum(x=chosen), mb.shape(x=chosen)]


def expected_lengths(x: torch.Tensor, size: list[int]) -> list[torch.Tensor]:
    chosen = x[: size[0], : size[1]]
    return [
        x.reshape(x.shape[1], 2, -1),
        torch.tensor([2 * x.shape[1]], dtype=torch.int32),
        chosen.sum().reshape(1),
        torch.tensor(size, dtype=torch.int32),
    ]


def check_lengths(program: CoreMLProgram) -> None:
    generator = torch.Generator().manual_seed(0)
    for length, size in ((3, [2, 1]), (5, [1, 2]), (3, [4, 3]), (5, [4, 5]), (3, [2, 1])):
        x = torch.randn(4, length, generator=generator)
        results = program(x=x, size=torch.tensor(size, dtype=torch.int32))
        for number, expected in enumerate(expected_lengths(x, size)):
            torch.testing.assert_close(results[f"out_{number}"], expected)


@pytest.fixture(scope="module")
def lengths_path(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lengths") / "model.mlpackage"
    inputs = {
        "x": mb.placeholder(shape=(4, get_new_symbol())),
        "size": mb.placeholder(shape=(2,), dtype=types.int32),
    }
    with warnings.catch_warnings():
        # coremltools says that it chooses a range; the one below replaces it.
        warnings.simplefilter("ignore", UserWarning)
        harness.save(harness.build_program(inputs, lengths, ct.target.iOS18), path, ct.target.iOS18)
    file = next(path.rglob("*.mlmodel"))
    spec = Model_pb2.Model.FromString(file.read_bytes())
    described = next(item for item in spec.description.input if item.name == "x")
    described.type.multiArrayType.shapeRange.sizeRanges[1].upperBound = 8
    file.write_bytes(spec.SerializeToString())
    return path


def test_programs_follow_the_shapes(lengths_path: Path) -> None:
    program = load(lengths_path)
    check_lengths(program)
    assert len(program._specialized) == 2
    known = program._known
    names = {
        output.name: output.slot for step in program._compiled.steps for output in step.outputs
    }
    assert names["out_1"] in known.values
    assert names["out_0"] in known.shapes - known.values
    assert names["out_3"] not in known.shapes


def test_specialized_programs_are_few(lengths_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "_MOST_SHAPES", 1)
    program = load(lengths_path)
    check_lengths(program)
    assert len(program._specialized) == 1


def test_a_specialized_program_drops_what_shapes_decide(
    lengths_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load(lengths_path)
    given = {"x": torch.ones(4, 3), "size": torch.tensor([1, 1], dtype=torch.int32)}
    computed: list[str] = []
    with program.observed(lambda step, values: computed.append(step.type)):
        program(given)
    assert computed.count("shape") == 2
    made: list[Any] = []

    def recording(data: Any, **kind: Any) -> torch.Tensor:
        made.append(data)
        return TENSOR(data, **kind)

    monkeypatch.setattr(torch, "tensor", recording)
    program(given)
    # Of the two, only the shape that data decides is computed again.
    assert [list(data) for data in made] == [[1, 1]]


TENSOR = torch.tensor


def mlp(variables: dict[str, Any]) -> list[Any]:
    x = variables["x"]
    weight = RNG.standard_normal((16, 16)).astype(np.float32) / 4
    for _ in range(3):
        hidden = mb.silu(x=mb.linear(x=mb.mul(x=x, y=np.float32(0.5)), weight=weight))
        x = mb.add(x=x, y=mb.transpose(x=hidden, perm=[1, 0]))
    old = mb.read_state(input=variables["sum"])
    new = mb.add(x=mb.cast(x=x, dtype="fp16"), y=old)
    mb.coreml_update_state(state=variables["sum"], value=new)
    return [x, mb.cast(x=new, dtype="fp32")]


@pytest.fixture(scope="module")
def mlp_path(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlp") / "model.mlpackage"
    inputs = {
        "x": mb.placeholder(shape=(16, 16)),
        "sum": mb.state_tensor_placeholder(shape=(16, 16), dtype=types.fp16),
    }
    harness.save(harness.build_program(inputs, mlp, ct.target.iOS18), path, ct.target.iOS18)
    return path


def test_fused_equals_unfused(mlp_path: Path) -> None:
    plain = load(mlp_path, execution=Execution(mode="fp32"))
    fused = load(mlp_path, execution=Execution(mode="fp32", compiled=True))
    for _ in range(3):
        x = torch.randn(16, 16)
        expected, actual = plain(x=x), fused(x=x)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


def test_only_the_unrounded_mode_is_fused(mlp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'declared' rounds between operations"):
        load(mlp_path, execution=Execution(compiled=True))


@pytest.mark.parametrize("budget", [None, 0])
def test_state_takes_a_constant_that_is_kept_wide_or_packed(
    harness: Any, tmp_path: Path, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "_LARGE", 0)
    path = tmp_path / "model.mlpackage"
    inputs = {
        "x": mb.placeholder(shape=(1, WIDTH)),
        "rows": mb.state_tensor_placeholder(shape=(ROWS, WIDTH), dtype=types.fp16),
    }

    def body(variables: dict[str, Any]) -> list[Any]:
        table = mb.const(val=DENSE)
        old = mb.read_state(input=variables["rows"])
        new = mb.slice_update(x=old, update=table, begin=[0, 0], end=[ROWS, WIDTH])
        mb.coreml_update_state(state=variables["rows"], value=new)
        product = mb.linear(x=mb.cast(x=variables["x"], dtype="fp16"), weight=table)
        return [product, mb.concat(values=[table, table], axis=0), mb.identity(x=table)]

    harness.save(harness.build_program(inputs, body, ct.target.iOS18), path, ct.target.iOS18)
    program = load(path, execution=Execution(memory_budget=budget))
    dense = torch.from_numpy(DENSE)
    for _ in range(2):
        results = program(x=torch.ones(1, WIDTH))
        torch.testing.assert_close(program.state("rows"), dense, rtol=0, atol=0)
        torch.testing.assert_close(results["out_1"], torch.cat([dense, dense]), rtol=0, atol=0)
        torch.testing.assert_close(results["out_2"], dense, rtol=0, atol=0)


def owned(variables: dict[str, Any]) -> list[Any]:
    x = variables["x"]
    total = mb.add(x=x, y=np.float32(1))
    top = mb.topk(x=x, k=2, axis=1, return_indices=False)
    return [
        total,
        mb.reshape(x=total, shape=[6]),
        mb.shape(x=x),
        top[0] if isinstance(top, (tuple, list)) else top,
    ]


def test_caller_owns_what_a_call_returns(load_program: Any) -> None:
    program = load_program({"x": mb.placeholder(shape=(2, 3))}, owned)
    x = torch.arange(6.0).reshape(2, 3)
    for _ in range(3):
        results = program(x=x)
        assert results["out_0"].tolist() == (x + 1).tolist()
        assert results["out_1"].tolist() == (x + 1).flatten().tolist()
        assert results["out_2"].tolist() == [2, 3]
        assert results["out_3"].tolist() == [[2, 1], [5, 4]]
        assert len({value.data_ptr() for value in results.values()}) == 4
        for value in results.values():
            value.add_(100)


def counted(variables: dict[str, Any]) -> list[Any]:
    """A run of operations over as many elements as the data decides."""
    places = mb.cast(x=mb.non_zero(x=variables["x"]), dtype="fp32")
    for _ in range(3):
        places = mb.tanh(x=mb.mul(x=mb.add(x=places, y=np.float32(1)), y=np.float32(0.5)))
    return [mb.reduce_sum(x=places)]


def test_sizes_from_data_are_not_compiled_in(load_program: Any, tmp_path: Path) -> None:
    plain = load_program({"x": mb.placeholder(shape=(5,))}, counted)
    fused = load(tmp_path / "model.mlpackage", execution=Execution(mode="fp32", compiled=True))
    for given in ([1, 0, 2, 0, 0], [1, 1, 1, 1, 0], [0, 0, 3, 0, 0], [1, 0, 2, 0, 0]):
        x = torch.tensor(given, dtype=torch.float32)
        torch.testing.assert_close(fused(x=x), plain(x=x))


def filled(variables: dict[str, Any]) -> list[Any]:
    """A large table whose size and values follow from the input's shape."""
    width = np.array([4096], np.int32)
    sizes = mb.concat(values=[mb.shape(x=variables["x"]), width], axis=0)
    table = mb.fill(shape=sizes, value=1.0)
    return [mb.reduce_sum(x=table), mb.shape(x=table)]


def test_large_values_are_not_kept_in_specialized_programs(load_program: Any) -> None:
    program = load_program({"x": mb.placeholder(shape=(2, 3))}, filled)
    for _ in range(2):
        results = program(x=torch.zeros(2, 3))
        assert results["out_0"].item() == 6 * 4096
        assert results["out_1"].tolist() == [2, 3, 4096]
    (special,) = program._specialized.values()
    kept = [value for value in special.initial if isinstance(value, torch.Tensor)]
    assert max(value.numel() for value in kept) <= 1024


def test_snapshot_takes_a_program_back(mlp_path: Path) -> None:
    program = load(mlp_path)
    x = torch.randn(16, 16)
    program(x=x)
    snapshot = program.snapshot()
    first = program(x=x)["out_1"]
    assert not torch.equal(program(x=x)["out_1"], first)
    program.restore(snapshot)
    torch.testing.assert_close(program(x=x)["out_1"], first, rtol=0, atol=0)
    # Neither the program nor the caller writes into the other's copy.
    program.restore(snapshot)
    torch.testing.assert_close(program(x=x)["out_1"], first, rtol=0, atol=0)


def shorter(snapshot: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"sum": snapshot["sum"][:3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda snapshot: {}, r"holds the states \[\]; the program has \['sum'\]"),
        (shorter, r"float16\[3, 16\]; the program's is torch.float16\[16, 16\]"),
        (lambda snapshot: {"sum": snapshot["sum"].float()}, "is torch.float32"),
    ],
)
def test_snapshot_of_another_program(
    mlp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    program = load(mlp_path)
    with pytest.raises(ArtifactError, match=message):
        program.restore(change(program.snapshot()))


def test_inputs_by_name_and_by_mapping(mlp_path: Path) -> None:
    x = torch.randn(16, 16)
    named, mapped = load(mlp_path)(x=x), load(mlp_path)({"x": x})
    for name in named:
        torch.testing.assert_close(named[name], mapped[name], rtol=0, atol=0)
    with pytest.raises(ArtifactError, match="no input 'y'"):
        load(mlp_path)({"x": x}, y=x)


def test_functions_share_their_weights(large_path: Path) -> None:
    """What a pool has expanded once is the same tensor in every program that uses the pool."""
    model, pool = model_of_folder(large_path), Execution().pool()
    first, second = CoreMLProgram(model, pool=pool), CoreMLProgram(model, pool=pool)

    def addresses(program: CoreMLProgram) -> set[int]:
        return {
            value.data_ptr()
            for value in program._compiled.initial
            if isinstance(value, torch.Tensor) and value.numel() == ROWS * WIDTH
        }

    assert addresses(first) == addresses(second)
    # As fp32 for the products, and as fp16 or not at all for the rest.
    assert 3 <= len(addresses(first)) <= 6
