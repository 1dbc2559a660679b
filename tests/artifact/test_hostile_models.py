"""Models made to harm: each is a clear error, in bounded time and memory; nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.proto import Model_pb2

from llm_coreml.artifact import limits, pte
from llm_coreml.artifact.inmemoryfs import pack, unpack
from llm_coreml.artifact.method_plan import Delegate
from llm_coreml.artifact.packages import BACKEND, Packages
from llm_coreml.errors import ArtifactError
from llm_coreml.reference import load, load_method

HUGE = 1 << 62
MODEL = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


pytestmark = pytest.mark.usefixtures("bounded")


def refused(path: Path, message: str, read: Callable[[Path], Any] = load_method) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        read(path)
    assert str(caught.value).isprintable()


def delegate_of(files: dict[str, bytes]) -> Delegate:
    return Delegate("forward", 0, BACKEND, {}, memoryview(pack(files)))


def opened(sample: Path, delegate: Delegate) -> Any:
    return Packages(pte.read(sample)).open(delegate)


NAMES = {"inputNames": ["x"], "outputNames": ["y"]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.mlmodelc/coremldata.bin": b""}, "compiled for a device"),
        ({"x": b""}, "no readable metadata.json"),
        ({"metadata.json": b"[" * 100_000}, "no readable metadata.json"),
        ({"metadata.json": b"[]"}, "no object"),
        ({"metadata.json": b"{}"}, "no file 'model.mlpackage/Manifest.json'"),
        ({"model.mlpackage/Manifest.json": b"[" * 100_000}, "Manifest.json is damaged"),
        ({"model.mlpackage/Manifest.json": b"[]"}, "Manifest.json is damaged"),
        ({"metadata.json": b" " * (1 << 21) + json.dumps(NAMES).encode()}, "no readable"),
    ],
)
def test_folder_that_holds_no_model(
    files: dict[str, bytes], message: str, sample_pte: Path
) -> None:
    whole = {"metadata.json": json.dumps(NAMES).encode(), **files}
    if message.startswith("no readable") and "metadata.json" not in files:
        del whole["metadata.json"]
    with pytest.raises(ArtifactError, match=message):
        opened(sample_pte, delegate_of(whole))


@pytest.mark.parametrize("path", ["../../../etc/passwd", "/etc/passwd", "x\0y", "", "."])
def test_manifest_that_leads_outside(path: str, sample_pte: Path) -> None:
    manifest = {"itemInfoEntries": {"a": {"path": path}}, "rootModelIdentifier": "a"}
    files = {
        "metadata.json": json.dumps(NAMES).encode(),
        "model.mlpackage/Manifest.json": json.dumps(manifest).encode(),
    }
    with pytest.raises(ArtifactError, match="has no file"):
        opened(sample_pte, delegate_of(files))


def test_files_that_overlap(sample_pte: Path) -> None:
    (delegate,) = pte.read_delegates(sample_pte)
    sizes = [len(content) for content in unpack(delegate.data).values()]
    blob = bytes(delegate.data)
    cut = blob.rindex(b"}") - len(blob)
    text = blob[sum(sizes) :][::-1]
    decoded = json.loads(text.lstrip(b"\0"))
    assert cut < 0
    inner = [node for node in decoded["nodes"] if node["dataRegion"]["offset"]]
    inner[0]["dataRegion"]["offset"] -= 1
    lie = blob[: sum(sizes)] + json.dumps(decoded).encode()[::-1]
    with pytest.raises(ArtifactError, match="overlap"):
        unpack(lie)


@pytest.fixture(scope="module")
def made_package(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.mlpackage` with a weight file, a state, and operations that make tensors from sizes."""

    def body(variables: dict[str, Any]) -> list[Any]:
        x = variables["x"]
        weight = np.arange(64, dtype=np.float32).reshape(8, 8)
        old = mb.read_state(input=variables["cache"])
        mb.coreml_update_state(state=variables["cache"], value=mb.add(x=old, y=np.float16(1)))
        return [
            mb.linear(x=x, weight=weight),
            mb.tile(x=x, reps=np.array([2, 1], np.int32), name="tiled"),
            mb.pad(x=x, pad=np.array([0, 0, 1, 2], np.int32), name="padded"),
        ]

    inputs = {
        "x": mb.placeholder(shape=(1, 8)),
        "cache": mb.state_tensor_placeholder(shape=(2, 3), dtype=types.fp16),
    }
    path = tmp_path_factory.mktemp("package") / "model.mlpackage"
    program = harness.build_program(inputs, body, ct.target.iOS18)
    harness.save(program, path, ct.target.iOS18)
    return path


@pytest.fixture
def package(made_package: Path, tmp_path: Path) -> Path:
    """A copy of it for the test to damage."""
    return Path(shutil.copytree(made_package, tmp_path / "model.mlpackage"))


def edited(package: Path, edit: Callable[[Any, Any, dict[str, Any]], None]) -> Path:
    """Change the model, its main function, and the operations by the name of their output."""
    file = package.parent / MODEL
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    edit(spec, function, {op.outputs[0].name: op for op in block.operations if op.outputs})
    file.write_bytes(spec.SerializeToString())
    return package


def set_sizes(kind: Any, *sizes: int) -> None:
    """Give a tensor type these sizes; -1 is one that only a call decides."""
    tensor = kind.tensorType
    tensor.rank = len(sizes)
    del tensor.dimensions[:]
    for size in sizes:
        if size < 0:
            tensor.dimensions.add().unknown.variadic = False
        else:
            tensor.dimensions.add().constant.size = size


def state_type(function: Any) -> Any:
    (found,) = (item.type for item in function.inputs if item.name == "cache")
    return found.stateType.wrappedType


def huge_result(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    set_sizes(operations["tiled"].outputs[0].type, 1 << 31, 1 << 31)


def endless_rank(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    set_sizes(operations["tiled"].outputs[0].type, *[1] * 100_000)


def overflowing_state(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    set_sizes(state_type(function), 2**64 - 1, 2**64 - 1)


def endless_state(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    set_sizes(state_type(function), 2, -1)


def shapeless_state(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    state_type(function).Clear()


def huge_input(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    spec.description.input[0].type.multiArrayType.shape[:] = [1 << 40, 1 << 22]


def negative_input(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    spec.description.input[0].type.multiArrayType.shape[:] = [-1, 8]


def huge_weight(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    for value in weights(function):
        set_sizes(value.type, 1 << 30, 1 << 30)


def larger_weight(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    for value in weights(function):
        set_sizes(value.type, 8, 9)


def weight_elsewhere(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    for value in weights(function):
        value.blobFileValue.fileName = "/etc/passwd"


def weight_above(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    for value in weights(function):
        value.blobFileValue.fileName = "@model_path/../../../../../etc/passwd"


def weight_far_away(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    for value in weights(function):
        value.blobFileValue.offset = 2**64 - 1


def weights(function: Any) -> list[Any]:
    """Return the constants in the weight file, and make their operations declare the same."""
    block = function.block_specializations[function.opset]
    found = [
        op.attributes["val"]
        for op in block.operations
        if op.type == "const" and op.attributes["val"].HasField("blobFileValue")
    ]
    assert found
    return found


def many_operations(spec: Any, function: Any, operations: dict[str, Any]) -> None:
    block = function.block_specializations[function.opset]
    (number,) = (field.number for field in block.DESCRIPTOR.fields if field.name == "operations")
    block.MergeFromString(bytes([number << 3 | 2, 0]) * 2_000_000)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (huge_result, "more than 1000000000 GiB of memory"),
        (endless_rank, "has rank 100000"),
        (overflowing_state, "more than 1000000000 GiB of memory"),
        (endless_state, "whose size is not fixed"),
        (shapeless_state, "not supported"),
        (huge_input, r"'x' of shape .* takes more than"),
        (negative_input, "impossible shape"),
        (huge_weight, "more than 1000000000 GiB|takes 4294967296 GiB"),
        (larger_weight, "declares fp32|holds 2048 bits"),
        (weight_elsewhere, "outside of the model"),
        (weight_above, "has no file"),
        (weight_far_away, "outside of the file"),
        (many_operations, "2000.* operations; at most"),
    ],
)
def test_model_that_lies_about_sizes(edit: Any, message: str, package: Path) -> None:
    refused(edited(package, edit), message, load)


def test_states_that_no_machine_holds(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(spec: Any, function: Any, operations: dict[str, Any]) -> None:
        set_sizes(state_type(function), 3 << 13, 1 << 14)

    # As fp16 it would fit, but the reference holds it in fp32.
    monkeypatch.setattr(limits, "machine_memory", lambda: 1 << 30)
    refused(edited(package, edit), r"state \(fp16\[24576, 16384\]\) takes 1 GiB", load)


@pytest.mark.parametrize(
    ("operation", "parameter", "values"),
    [("tiled", "reps", [1 << 20, 1 << 20]), ("padded", "pad", [0, 1 << 30, 0, 1 << 30])],
)
def test_operation_that_makes_terabytes(
    operation: str, parameter: str, values: list[int], package: Path
) -> None:
    def edit(spec: Any, function: Any, operations: dict[str, Any]) -> None:
        changed = operations[operation]
        set_sizes(changed.outputs[0].type, -1, -1)
        for later in operations.values():
            for argument in later.inputs.values():
                if any(item.name == operation for item in argument.arguments):
                    set_sizes(later.outputs[0].type, -1, -1)
        (binding,) = changed.inputs[parameter].arguments
        constant = operations[binding.name].attributes["val"]
        set_sizes(constant.type, len(values))
        set_sizes(operations[binding.name].outputs[0].type, len(values))
        constant.immediateValue.tensor.ints.values[:] = values

    program = load(edited(package, edit))
    with pytest.raises(ArtifactError, match=rf"'{operation}' .* makes a tensor that takes"):
        program({"x": torch.zeros(1, 8)})


@pytest.mark.parametrize("size", [0, 4, 8, 63, 64, 68, 72, 88, 127, 128, 200, 383])
def test_weight_file_cut_at_every_part(size: int, package: Path) -> None:
    load(package)
    file = package.parent / WEIGHTS
    content = file.read_bytes()
    assert len(content) == 64 + 64 + 4 * 64
    file.write_bytes(content[:size])
    refused(package, r"weight\.bin", load)


@pytest.mark.parametrize(("at", "value"), [(72, HUGE), (80, HUGE), (80, 2**64 - 1), (88, 7)])
def test_weight_metadata_that_lies(at: int, value: int, package: Path) -> None:
    file = package.parent / WEIGHTS
    content = bytearray(file.read_bytes())
    struct.pack_into("<Q", content, at, value)
    file.write_bytes(content)
    if at == 88:
        # Padding bits count for elements narrower than a byte only.
        load(package)
    else:
        refused(package, "truncated|holds", load)


def test_messages_nested_without_end(package: Path) -> None:
    # A pipeline of pipelines: field 202 of the model, whose field 1 is a model.
    data = b""
    for _ in range(5000):
        for tag in (b"\x0a", b"\xd2\x0c"):
            data = tag + _varint(len(data)) + data
    (package.parent / MODEL).write_bytes(data)
    refused(package, "protobuf is damaged", load)


def _varint(value: int) -> bytes:
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def test_program_of_absurd_size(package: Path) -> None:
    os.truncate(package.parent / MODEL, (1 << 27) + 1)
    refused(package, "without its weights", load)


@pytest.mark.parametrize("kind", ["file", "folder", "inside"])
def test_links_are_not_followed(kind: str, package: Path, tmp_path: Path) -> None:
    if kind == "folder":
        (package / "link").symlink_to("/etc", target_is_directory=True)
    elif kind == "file":
        (package / "link").symlink_to("/etc/passwd")
    else:
        (package / "link").symlink_to(package, target_is_directory=True)
    refused(package, r"is a link.*cp -RL", load)


def test_too_many_files(package: Path) -> None:
    for number in range(300):
        (package / str(number)).touch()
    refused(package, "more than 256 files", load)


def test_compiled_models_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "model.mlmodelc"
    folder.mkdir()
    refused(folder, "compiled for a device; export it uncompiled", load)
    (tmp_path / "coremldata.bin").touch()
    refused(tmp_path, "compiled for a device", load)
    (tmp_path / "coremldata.bin").unlink()
    refused(tmp_path, "no .mlpackage", load)


def test_names_reach_no_terminal(package: Path) -> None:
    def edit(spec: Any, function: Any, operations: dict[str, Any]) -> None:
        operations["tiled"].type = "ti\x1b[2J\nle" + "x" * 10_000

    with pytest.raises(ArtifactError) as caught:
        load(edited(package, edit))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 3000
