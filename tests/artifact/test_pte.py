from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_coreml.artifact import pte
from llm_coreml.errors import ArtifactError
from llm_coreml.reference import load, load_method


def test_agrees_with_executorch(sample_pte: Path) -> None:
    ours = pte.read(sample_pte)
    theirs = deserialize_pte_binary(sample_pte.read_bytes()).program
    assert list(ours.methods) == [plan.name for plan in theirs.execution_plan]
    for plan in theirs.execution_plan:
        method = ours.methods[plan.name]
        assert list(method.inputs) == plan.inputs
        assert list(method.outputs) == plan.outputs
        assert len(method.values) == len(plan.values)
        for mine, value in zip(method.values, plan.values, strict=True):
            if isinstance(mine, pte.TensorSpec):
                assert list(mine.shape) == value.val.sizes
                assert mine.dynamic == (value.val.shape_dynamism != 0)
        for delegate, other in zip(method.delegates, plan.delegates, strict=True):
            assert delegate.backend == other.id
            assert delegate.compile_specs == {spec.key: spec.value for spec in other.compile_specs}
            data = theirs.backend_delegate_data[other.processed.index].data
            assert bytes(delegate.data) == data
        steps = [item.instr_args for chain in plan.chains for item in chain.instructions]
        assert [list(step.args) for step in method.instructions] == [step.args for step in steps]
        for step, other in zip(method.instructions, steps, strict=True):
            if step.kind == "kernel":
                operator = plan.operators[other.op_index]
                assert step.target == f"{operator.name}.{operator.overload}"


def test_constant_methods(sample_pte: Path) -> None:
    assert pte.constant_methods(sample_pte) == {
        "get_max_seq_len": 16,
        "get_eos_ids": [1, 2],
        "use_kv_cache": True,
        "get_scale": 1.5,
        "get_zero": 0,
    }


def test_delegates(sample_pte: Path) -> None:
    (delegate,) = pte.read_delegates(sample_pte)
    assert (delegate.method, delegate.index, delegate.backend) == ("forward", 0, "CoreMLBackend")
    assert delegate.compile_specs["min_deployment_target"] == b"9"


def test_every_kind_of_truncation_is_refused(sample_pte: Path, tmp_path: Path) -> None:
    data = sample_pte.read_bytes()
    path = tmp_path / "cut.pte"
    sizes = {*range(0, 200), *range(0, len(data), len(data) // 150), len(data) - 1}
    for size in sorted(sizes):
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=r"cut\.pte"):
            pte.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"ET12", "too few"),
        (b"garbage" * 100, "mark ET12"),
        (b"\0" * 4 + b"ET13" + b"\0" * 100, "mark ET12"),
        (b"\xff" * 4 + b"ET12" + b"\0" * 100, "offset points"),
        (b"\0" * 4 + b"ET12" + b"\0" * 100, "without a method"),
    ],
)
def test_garbage_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.pte"
    path.write_bytes(content)
    for read in (pte.read, load, load_method):
        with pytest.raises(ArtifactError, match=message):
            read(path)


def test_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        pte.read(tmp_path / "none.pte")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_escape(sample_pte: Path, tmp_path: Path, data: Any) -> None:
    content = bytearray(sample_pte.read_bytes())
    program = struct.unpack_from("<Q", content, 16)[0]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(program, 3000) - 4))
        value = data.draw(st.sampled_from([0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000]))
        struct.pack_into("<I", content, place, value)
    path = tmp_path / "flipped.pte"
    path.write_bytes(content)
    try:
        load_method(path)
    except ArtifactError as error:
        assert "\n" not in str(error)


def test_segments(segmented_pte: Path, sample_pte: Path) -> None:
    (delegate,) = pte.read_delegates(segmented_pte)
    theirs = deserialize_pte_binary(segmented_pte.read_bytes()).program
    assert bytes(delegate.data) == theirs.backend_delegate_data[0].data
    data = segmented_pte.read_bytes()
    path = segmented_pte.with_name("cut.pte")
    for size in (len(data) - 1, len(data) // 2, 400):
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=r"truncated: \d+ bytes of at least"):
            pte.read(path)


def test_another_backend_is_named(xnnpack_pte: Path) -> None:
    for read in (load, load_method):
        with pytest.raises(ArtifactError, match="XnnpackBackend"):
            read(xnnpack_pte)


def test_lists_that_refer_to_one_another_end(tmp_path: Path) -> None:
    # A list of plans whose entries are all the same table costs visits, not time without end.
    count = 60_000
    vtable = struct.pack("<HHHH", 8, 8, 0, 4)
    head = struct.pack("<I4s", 16, b"ET12") + vtable
    table = struct.pack("<iI", 8, 4)
    vector = struct.pack("<I", count)
    body = b"".join(struct.pack("<I", 4 * (count - at)) for at in range(count))
    inner = struct.pack("<i", len(head) + len(table) + len(vector) + len(body) - 8)
    path = tmp_path / "loop.pte"
    path.write_bytes(head + table + vector + body + inner + bytes(64))
    with pytest.raises(ArtifactError):
        pte.read(path)


def test_unknown_kernel_is_named_at_load(portable_pte: Path, tmp_path: Path) -> None:
    path = tmp_path / "unknown.pte"
    path.write_bytes(portable_pte.read_bytes().replace(b"aten::flip", b"aten::flap"))
    with pytest.raises(ArtifactError, match=r"runs 'aten::flap.out' outside.*mean 'aten::flip.out"):
        load_method(path)


def test_kernel_between_two_delegates(portable_pte: Path) -> None:
    x = torch.tensor([-3.0, 1.5])
    wanted = torch.sigmoid(torch.relu(x + 1).flip(0) + 1)
    torch.testing.assert_close(load_method(portable_pte)(x), wanted, rtol=0, atol=1e-3)
    with pytest.raises(ArtifactError, match="2 Core ML delegates"):
        load(portable_pte)


def test_sample_matches_torch(sample_pte: Path) -> None:
    forward = load_method(sample_pte)
    assert [spec.dtype for spec in forward.inputs] == ["int64", "int64"]
    tokens, start = torch.tensor([[1, 2, 3]]), torch.tensor([0])
    first = forward(tokens, start)
    assert first.dtype == torch.float32
    second = forward(tokens, start)
    forward.reset()
    torch.testing.assert_close(forward(tokens, start), first)
    assert not torch.equal(first, second)
    with pytest.raises(ArtifactError, match="takes 2 arguments"):
        forward(tokens)
    with pytest.raises(ArtifactError, match=r"torch\.int32; the plan says int64"):
        forward(tokens.int(), start)
    with pytest.raises(ArtifactError, match=r"shape \[1, 4\]"):
        forward(torch.ones(1, 4, dtype=torch.int64), start)
    with pytest.raises(ArtifactError, match="int32 cannot hold"):
        forward(tokens, torch.tensor([1 << 40]))
    with pytest.raises(ArtifactError, match="no method 'forwards'"):
        load_method(sample_pte, "forwards")
