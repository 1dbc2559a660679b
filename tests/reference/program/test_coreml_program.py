"""Whole programs: states, declared types, shapes, rounding, and what must be refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.proto import MIL_pb2, Model_pb2

from llm_coreml.errors import ArtifactError
from llm_coreml.reference import CoreMLProgram, load

SIZE, WIDTH = 12, 4


def cache_inputs(length: int | None = None) -> dict[str, Any]:
    return {
        "x": mb.placeholder(shape=(2, 3, WIDTH) if length is None else (2, length, WIDTH)),
        "at": mb.placeholder(shape=(1,), dtype=types.int32),
        "cache": mb.state_tensor_placeholder(shape=(2, SIZE, WIDTH), dtype=types.fp16),
    }


def write_rows(cache: Any, x: Any, at: Any) -> Any:
    end = mb.add(x=at, y=np.int32(3))
    zero, full = np.array([0], np.int32), np.array([2], np.int32)
    return mb.slice_update(
        x=cache,
        update=x,
        begin=mb.concat(values=[zero, at, zero], axis=0),
        end=mb.concat(values=[full, end, np.array([WIDTH], np.int32)], axis=0),
    )


def cached(variables: dict[str, Any]) -> list[Any]:
    old = mb.read_state(input=variables["cache"])
    new = write_rows(old, mb.cast(x=variables["x"], dtype="fp16"), variables["at"])
    mb.coreml_update_state(state=variables["cache"], value=new)
    current = mb.read_state(input=variables["cache"])
    return [mb.reduce_sum(x=mb.cast(x=current, dtype="fp32"), axes=[1])]


def run_chunks(program: CoreMLProgram, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    full = torch.zeros(2, SIZE, WIDTH)
    result = torch.empty(0)
    for at in (0, 3, 6, 9):
        x = torch.randn(2, 3, WIDTH)
        full[:, at : at + 3] = x.half().float()
        result = program({"x": x, "at": torch.tensor([at], dtype=torch.int32)})["out_0"]
    return full, result


def test_state_is_updated_in_chunks_and_in_place(load_program: Any) -> None:
    program = load_program(cache_inputs(), cached)
    before = program._state_values["cache"].data_ptr()
    full, result = run_chunks(program)
    torch.testing.assert_close(program.state("cache"), full.half(), rtol=0, atol=0)
    torch.testing.assert_close(result, full.sum(1))
    assert program._state_values["cache"].data_ptr() == before
    program.reset()
    assert not program.state("cache").any()


def test_values_read_before_an_update_keep_their_content(load_program: Any) -> None:
    def body(variables: dict[str, Any]) -> list[Any]:
        old = mb.read_state(input=variables["cache"])
        part = mb.slice_by_index(x=old, begin=[0, 0, 0], end=[2, 3, WIDTH])
        x = mb.cast(x=variables["x"], dtype="fp16")
        new = write_rows(old, x, variables["at"])
        mb.coreml_update_state(state=variables["cache"], value=new)
        return [mb.cast(x=part, dtype="fp32"), mb.cast(x=new, dtype="fp32")]

    program = load_program(cache_inputs(), body)
    feeds = {"x": torch.ones(2, 3, WIDTH), "at": torch.tensor([0], dtype=torch.int32)}
    first = program(feeds)
    assert not first["out_0"].any()
    second = program({**feeds, "x": torch.full((2, 3, WIDTH), 2.0)})
    assert (second["out_0"] == 1).all()
    # What an earlier call returned belongs to the caller.
    assert (first["out_1"][:, :3] == 1).all()


def test_update_that_is_not_stored_leaves_the_state(load_program: Any) -> None:
    def body(variables: dict[str, Any]) -> list[Any]:
        old = mb.read_state(input=variables["cache"])
        new = write_rows(old, mb.cast(x=variables["x"], dtype="fp16"), variables["at"])
        return [mb.cast(x=new, dtype="fp32")]

    program = load_program(cache_inputs(), body)
    program({"x": torch.ones(2, 3, WIDTH), "at": torch.tensor([0], dtype=torch.int32)})
    assert not program.state("cache").any()


def test_half_is_rounded_after_each_operation(load_program: Any) -> None:
    def body(variables: dict[str, Any]) -> list[Any]:
        x = mb.cast(x=variables["x"], dtype="fp16")
        big = mb.mul(x=x, y=np.float16(300))
        return [
            mb.sub(x=mb.add(x=x, y=np.float16(2048)), y=np.float16(2048)),
            mb.mul(x=big, y=np.float16(0.001)),
            mb.add(x=variables["x"], y=np.float32(2048)),
        ]

    program = load_program({"x": mb.placeholder(shape=(3,))}, body)
    results = program({"x": torch.tensor([0.3, 1.0, 300.0])})
    assert results["out_0"].dtype == torch.float16
    assert results["out_0"].tolist() == [0.0, 0.0, 300.0]
    assert results["out_1"][2].item() == float("inf")
    torch.testing.assert_close(results["out_2"], torch.tensor([2048.3, 2049.0, 2348.0]))


def convert(
    module: torch.nn.Module, arguments: tuple[Any, ...], path: Path, **settings: Any
) -> Any:
    model = ct.convert(
        torch.export.export(module.eval(), arguments).run_decompositions({}),
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        **settings,
    )
    model.save(str(path))
    return model


class ScalarBranches(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, 1.0, 0.0) * 2.0


def test_select_that_declares_a_scalar_is_caught(tmp_path: Path) -> None:
    # coremltools broadcasts the branches only where every size is known.
    path = tmp_path / "lie.mlpackage"
    length = torch.export.Dim("length", min=3, max=5)
    model = ct.convert(
        torch.export.export(
            ScalarBranches(), (torch.zeros(1, 3),), dynamic_shapes={"x": {1: length}}
        ).run_decompositions({}),
        inputs=[ct.TensorType("x", ct.EnumeratedShapes([[1, 3], [1, 5]]))],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    model.save(str(path))
    with pytest.raises(ArtifactError, match=r"\(select\) gives .*\[1, 3\].*declares fp\d+\[\]"):
        load(path)({"x": torch.randn(1, 3, dtype=torch.float16)})


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(32, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.qkv = torch.nn.Linear(16, 48)
        self.out = torch.nn.Linear(16, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embedding(tokens))
        query, key, value = self.qkv(hidden).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(torch.nn.functional.silu(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("precision", ["FLOAT32", "FLOAT16"])
def test_transformer_block_matches_torch(precision: str, tmp_path: Path) -> None:
    block, tokens = Block().eval(), torch.randint(32, (1, 6), dtype=torch.int32)
    path = tmp_path / "block.mlpackage"
    convert(block, (tokens,), path, compute_precision=ct.precision[precision])
    program = load(path)
    (actual,) = program({program.inputs[0].name: tokens}).values()
    tolerance = 1e-5 if precision == "FLOAT32" else 5e-3
    with torch.no_grad():
        torch.testing.assert_close(actual.float(), block(tokens), rtol=tolerance, atol=tolerance)


def test_enumerated_shapes(tmp_path: Path) -> None:
    length = torch.export.Dim("length", min=3, max=5)
    program = ct.convert(
        torch.export.export(
            torch.nn.ReLU(), (torch.zeros(1, 3),), dynamic_shapes={"input": {1: length}}
        ).run_decompositions({}),
        inputs=[ct.TensorType("x", ct.EnumeratedShapes([[1, 3], [1, 5]]))],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    path = tmp_path / "shapes.mlpackage"
    program.save(str(path))
    loaded = load(path)
    assert set(loaded.inputs[0].enumerated) == {(1, 3), (1, 5)}
    for size in (3, 5):
        (result,) = loaded({"x": -torch.ones(1, size)}).values()
        assert result.shape == (1, size)
    with pytest.raises(ArtifactError, match=r"\[1, 4\].*not enumerated.*\[1, 3\]"):
        loaded({"x": torch.ones(1, 4)})


def simple(variables: dict[str, Any]) -> list[Any]:
    return [mb.add(x=variables["x"], y=np.float32(1), name="sum")]


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "'x' is missing"),
        ({"x": torch.zeros(2), "y": torch.zeros(2)}, "no input 'y'"),
        ({"x": torch.zeros(3)}, r"shape \[3\]"),
        ({"x": torch.zeros(2, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(2, dtype=torch.float16)}, "float16"),
    ],
)
def test_wrong_inputs_are_refused(feeds: Any, message: str, load_program: Any) -> None:
    program = load_program({"x": mb.placeholder(shape=(2,))}, simple)
    with pytest.raises(ArtifactError, match=message):
        program(feeds)


def edited(path: Path, edit: Any) -> Path:
    """Apply `edit` to the operations of the saved model at `path`."""
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    edit({op.outputs[0].name: op for op in block.operations if op.outputs}, block)
    file.write_bytes(spec.SerializeToString())
    return path


def rename(operations: Any, block: Any) -> None:
    operations["sum"].type = "addd"


def wrong_rank(operations: Any, block: Any) -> None:
    tensor = operations["sum"].outputs[0].type.tensorType
    tensor.rank = 0
    del tensor.dimensions[:]


def wrong_size(operations: Any, block: Any) -> None:
    operations["sum"].outputs[0].type.tensorType.dimensions[0].constant.size = 7


def wrong_type(operations: Any, block: Any) -> None:
    operations["sum"].outputs[0].type.tensorType.dataType = MIL_pb2.FLOAT16


def unknown_parameter(operations: Any, block: Any) -> None:
    operations["sum"].inputs["z"].CopyFrom(operations["sum"].inputs["x"])


def missing_parameter(operations: Any, block: Any) -> None:
    del operations["sum"].inputs["y"]


def undefined_value(operations: Any, block: Any) -> None:
    operations["sum"].inputs["x"].arguments[0].name = "nowhere"


def used_early(operations: Any, block: Any) -> None:
    operations["sum"].inputs["x"].arguments[0].name = "out_0"


def defined_twice(operations: Any, block: Any) -> None:
    block.operations.append(operations["sum"])


def nested(operations: Any, block: Any) -> None:
    operations["sum"].blocks.add()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename, r"'sum' \(addd\) is not known.*Did you mean 'add'"),
        (wrong_type, "but its inputs make it fp32"),
        (unknown_parameter, "has the parameter 'z'"),
        (missing_parameter, "lacks y"),
        (undefined_value, "'nowhere', which nothing defines"),
        (used_early, "uses 'out_0', which nothing defines before"),
        (defined_twice, "defines 'sum' twice"),
        (nested, "nested blocks"),
    ],
)
def test_wrong_programs_are_refused_at_load(
    edit: Any, message: str, load_program: Any, tmp_path: Path
) -> None:
    load_program({"x": mb.placeholder(shape=(2,))}, simple)
    with pytest.raises(ArtifactError, match=message):
        load(edited(tmp_path / "model.mlpackage", edit))


@pytest.mark.parametrize(
    ("edit", "declared"), [(wrong_rank, r"fp32\[\]"), (wrong_size, r"fp32\[7\]")]
)
def test_wrong_declared_shapes_are_caught(
    edit: Any, declared: str, load_program: Any, tmp_path: Path
) -> None:
    load_program({"x": mb.placeholder(shape=(2,))}, simple)
    program = load(edited(tmp_path / "model.mlpackage", edit))
    with pytest.raises(ArtifactError, match=rf"'sum' \(add\) gives float32\[2\].*{declared}"):
        program({"x": torch.zeros(2)})


def test_damaged_packages_are_refused(load_program: Any, tmp_path: Path) -> None:
    load_program({"x": mb.placeholder(shape=(2,))}, simple)
    path = tmp_path / "model.mlpackage"
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    content = file.read_bytes()
    for size in itertools.chain(range(0, 40), range(40, len(content) - 1, 29)):
        file.write_bytes(content[:size])
        with pytest.raises(ArtifactError):
            load(path)
    file.unlink()
    with pytest.raises(ArtifactError, match="no file"):
        load(path)
    (path / "Manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="Manifest"):
        load(path)


def test_functions_are_chosen_by_name(load_program: Any, tmp_path: Path) -> None:
    program = load_program({"x": mb.placeholder(shape=(2,))}, simple)
    assert program.function_names == ("main",)
    with pytest.raises(ArtifactError, match=r"no function 'mains'.*Did you mean 'main'"):
        load(tmp_path / "model.mlpackage", "mains")


def test_large_weights_come_from_the_weight_file(load_program: Any, tmp_path: Path) -> None:
    weight = np.arange(64, dtype=np.float32).reshape(8, 8)
    program = load_program(
        {"x": mb.placeholder(shape=(1, 8))}, lambda v: [mb.linear(x=v["x"], weight=weight)]
    )
    assert (tmp_path / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin").exists()
    x = torch.randn(1, 8)
    torch.testing.assert_close(program({"x": x})["out_0"], x @ torch.from_numpy(weight).T)
