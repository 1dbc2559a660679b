"""Containers made to harm: each is a clear error, in bounded time and memory; nothing is left."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

from llm_coreml.artifact import flatbuffer, pte
from llm_coreml.artifact.method_plan import Instruction, Method, TensorSpec
from llm_coreml.artifact.packages import Packages
from llm_coreml.errors import ArtifactError
from llm_coreml.reference import load_method
from llm_coreml.reference.method.method import LoadedMethod
from llm_coreml.reference.program.execution import Execution

HUGE = 1 << 62
MODEL = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


pytestmark = pytest.mark.usefixtures("bounded")


def refused(path: Path, message: str, read: Callable[[Path], Any] = load_method) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        read(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["sample", "segmented"])
def test_program_cut_wherever_something_is_read(
    name: str,
    sample_pte: Path,
    segmented_pte: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = {"sample": sample_pte, "segmented": segmented_pte}[name]
    visited: set[int] = set()
    scalar = flatbuffer._Buffer.scalar

    def recorded(buffer: Any, kind: str, position: int) -> int:
        visited.add(position)
        return scalar(buffer, kind, position)

    with monkeypatch.context() as patched:
        patched.setattr(flatbuffer._Buffer, "scalar", recorded)
        pte.read(source)
    places = sorted(visited)
    assert len(places) > 300
    content, path = bytearray(source.read_bytes()), tmp_path / "cut.pte"
    for place in places[:: len(places) // 300]:
        if content[8:12] == b"eh00":
            # A header that agrees with the cut, so that the program itself has to notice.
            struct.pack_into("<QQQ", content, 16, place, place, 0)
        path.write_bytes(content[: max(place, 40)])
        refused(path, "is not a readable ExecuTorch program", pte.read)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (16, HUGE, "truncated"),
        (16, 0, "mark ET12"),
        (16, 7, "mark ET12"),
        (24, HUGE, "truncated"),
        (24, 16, "overlap"),
        (32, HUGE, "truncated"),
        (32, 2**64 - 1, "truncated"),
    ],
)
def test_header_that_lies(
    at: int, value: int, message: str, segmented_pte: Path, tmp_path: Path
) -> None:
    content = bytearray(segmented_pte.read_bytes())
    struct.pack_into("<Q", content, at, value)
    (tmp_path / "lie.pte").write_bytes(content)
    refused(tmp_path / "lie.pte", message)


def test_segment_that_runs_past_the_end(segmented_pte: Path, tmp_path: Path) -> None:
    content = segmented_pte.read_bytes()
    (delegate,) = pte.read_delegates(segmented_pte)
    old = struct.pack("<Q", len(delegate.data))
    for size in (len(delegate.data) + 1, HUGE, 2**64 - 1):
        # The header's total stays; only the segment's own table claims more.
        lie = content[:48] + content[48:].replace(old, struct.pack("<Q", size), 1)
        (tmp_path / "lie.pte").write_bytes(lie)
        refused(tmp_path / "lie.pte", r"truncated: a segment ends at byte \d+ of \d+")


def test_segments_that_overlap(two_segments_pte: Path, tmp_path: Path) -> None:
    content = two_segments_pte.read_bytes()
    assert load_method(two_segments_pte)(torch.zeros(2)).shape == (2,)
    base = struct.unpack_from("<Q", content, 24)[0]
    first, second = pte.read_delegates(two_segments_pte)
    offset = max(content.index(bytes(item.data)) for item in (first, second)) - base
    assert content[:base].count(struct.pack("<Q", offset)) == 1
    lie = content[:base].replace(struct.pack("<Q", offset), struct.pack("<Q", 16))
    path = tmp_path / "overlap.pte"
    path.write_bytes(lie + content[base:])
    refused(path, "segments overlap")


def test_data_in_another_file_is_refused(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2).eval().requires_grad_(False)
    edge = to_edge_transform_and_lower(torch.export.export(module, (torch.zeros(1, 3),)))
    made = edge.to_executorch(ExecutorchBackendConfig(external_constants=True))
    path = tmp_path / "external.pte"
    path.write_bytes(made.buffer)
    container = pte.read(path)
    with pytest.raises(ArtifactError, match=r"'.*weight' from a \.ptd file.*one file"):
        LoadedMethod(container.methods["forward"], Packages(container), Execution().pool(), {})


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "empty"])
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.pte"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    else:
        path = Path("/dev/zero")
    refused(path, "is empty" if kind == "empty" else "no regular file")


# The plan.


def changed(path: Path, change: Callable[[Method], Method]) -> Callable[[], LoadedMethod]:
    container = pte.read(path)
    method = change(container.methods["forward"])
    return lambda: LoadedMethod(method, Packages(container), Execution().pool(), {})


def with_value(number: int, **changes: Any) -> Callable[[Method], Method]:
    def change(method: Method) -> Method:
        values = list(method.values)
        spec = values[number]
        assert isinstance(spec, TensorSpec)
        values[number] = replace(spec, **changes)
        return replace(method, values=tuple(values))

    return change


def with_step(kind: str, target: str, *args: int) -> Callable[[Method], Method]:
    return lambda method: replace(
        method, instructions=(Instruction(kind, target, args), *method.instructions)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda method: replace(method, arenas=(0, HUGE)), r"of memory, of which this machine"),
        (with_value(0, dtype="scalar type 40"), "unknown"),
        (with_value(0, dtype="nn"), "unknown"),
        (with_value(0, dim_order=(1, 0)), r"dimension order \[1, 0\]"),
        (with_value(0, external="weight"), r"\.ptd"),
        (with_step("kernel", "aten::add.out", 0), "called with 1 values, not 5"),
        (with_step("kernel", "aten::add.out", 0, 0, 0, 3, 3), "not a tensor"),
        (with_step("kernel", "aten::nonzero.out", 0, 0), r"runs 'aten::nonzero\.out' outside"),
        (with_step("kernel", "os::system", 0, 0), "runs 'os::system' outside"),
        (with_step("kernel", "dim_order_ops::_to_dim_order_copy.out"), "called with 0 values"),
        (with_step("jump_false", "0", 0), "branches, but no loops"),
        (with_step("jump_false", "9999", 0), "branches, but no loops"),
    ],
)
def test_plan_that_cannot_be_followed(
    change: Callable[[Method], Method], message: str, sample_pte: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        changed(sample_pte, change)()


@pytest.mark.parametrize(
    ("name", "constants", "message"),
    [
        ("aten::full.out", ([HUGE, 8], 1.0), "fails"),
        ("aten::full.out", ([1 << 20, 1 << 20], 1.0), r"shape \[1048576, 1048576\]; the plan says"),
        ("aten::repeat.out", (0, [1 << 20, 1 << 20]), r"the plan says"),
        ("aten::arange.out", (1e15,), r"the plan says"),
        ("aten::slice_copy.Tensor_out", (0, 7, None, None, 1), "fails"),
        ("aten::index_select.out", (0, 0, 5.0), "fails"),
        ("executorch_prim::et_view.default", (0, [HUGE]), "fails"),
    ],
)
def test_kernel_that_asks_for_too_much(
    name: str, constants: tuple[Any, ...], message: str, sample_pte: Path
) -> None:
    def change(method: Method) -> Method:
        number = len(method.values)
        result = replace(
            method.values[0], dtype="float32", shape=(4,), dim_order=(0,), place=None, nbytes=16
        )
        # The first argument is the method's own, the others are constants of the plan.
        args = [0 if item == 0 else number + 1 + at for at, item in enumerate(constants)]
        repeat = () if name.startswith("executorch_prim") else (number,)
        step = Instruction("kernel", name, (*args, number, *repeat))
        return replace(method, values=(*method.values, result, *constants), instructions=(step,))

    method = changed(sample_pte, change)()
    with pytest.raises(ArtifactError, match=message):
        method.run(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0]))
