"""Branches and loops, around states and in one another."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from llm_coreml.errors import ArtifactError
from llm_coreml.reference import load
from llm_coreml.reference.program import control

X = {"x": mb.placeholder(shape=(3,)), "n": mb.placeholder(shape=(1,), dtype=types.int32)}


def feeds(number: int) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([1.0, 2.0, 3.0]), "n": torch.tensor([number], dtype=torch.int32)}


def scalar(variables: dict[str, Any]) -> Any:
    return mb.squeeze(x=variables["n"], axes=[0])


def branch(variables: dict[str, Any]) -> list[Any]:
    x = variables["x"]
    positive = mb.greater(x=scalar(variables), y=np.int32(0))
    twice, moved = mb.cond(
        pred=positive,
        _true_fn=lambda: (mb.mul(x=x, y=np.float32(2)), x),
        _false_fn=lambda: (x, mb.add(x=mb.sub(x=x, y=np.float32(1)), y=np.float32(0.5))),
    )
    return [twice, moved]


def test_branch_runs_the_chosen_block(load_program: Any) -> None:
    program = load_program(X, branch)
    x = torch.tensor([1.0, 2.0, 3.0])
    for number, expected in ((1, (2 * x, x)), (-1, (x, x - 0.5)), (5, (2 * x, x))):
        results = program(feeds(number))
        torch.testing.assert_close((results["out_0"], results["out_1"]), expected)


def power(variables: dict[str, Any]) -> list[Any]:
    """n times doubled, and the rounds counted."""
    limit = scalar(variables)
    count, value = mb.while_loop(
        _cond=lambda count, value: mb.less(x=count, y=limit),
        _body=lambda count, value: (
            mb.add(x=count, y=np.int32(1)),
            mb.cond(
                pred=mb.equal(x=mb.mod(x=count, y=np.int32(2)), y=np.int32(0)),
                _true_fn=lambda: mb.mul(x=value, y=np.float32(2)),
                _false_fn=lambda: mb.add(x=value, y=np.float32(1)),
            ),
        ),
        loop_vars=(np.int32(0), variables["x"]),
    )
    return [value, count]


def test_loop_with_a_branch_inside(load_program: Any) -> None:
    program = load_program(X, power)
    for rounds in (0, 1, 4, 5, 4):
        expected = torch.tensor([1.0, 2.0, 3.0])
        for count in range(rounds):
            expected = expected * 2 if count % 2 == 0 else expected + 1
        results = program(feeds(rounds))
        torch.testing.assert_close(results["out_0"], expected)
        assert results["out_1"].item() == rounds


def growing(variables: dict[str, Any]) -> list[Any]:
    """A loop whose value grows: its size is known to no one before it ends."""
    limit, start = scalar(variables), np.array([0], np.int32)
    first = mb.slice_by_size(x=variables["x"], begin=start, size=variables["n"])
    _, value = mb.while_loop(
        _cond=lambda count, value: mb.less(x=count, y=limit),
        _body=lambda count, value: (
            mb.add(x=count, y=np.int32(1)),
            mb.concat(values=[value, variables["x"]], axis=0),
        ),
        loop_vars=(np.int32(0), first),
    )
    return [mb.reduce_sum(x=value), mb.shape(x=value)]


def test_sizes_after_a_loop_are_computed_in_every_call(load_program: Any) -> None:
    program = load_program(X, growing)
    for rounds in (1, 3, 2, 1):
        results = program(feeds(rounds))
        assert results["out_1"].tolist() == [rounds + 3 * rounds]
        expected = sum((1.0, 2.0, 3.0)[:rounds]) + 6.0 * rounds
        assert results["out_0"].item() == pytest.approx(expected)


def test_endless_loop_is_stopped(load_program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_MOST_ROUNDS", 100)
    program = load_program(X, power)
    with pytest.raises(ArtifactError, match=r"\(while_loop\) does not end within 100 rounds"):
        program(feeds(101))


def stateful(variables: dict[str, Any]) -> list[Any]:
    """Between a read and the update of a state, a branch reads the state."""
    state = variables["total"]
    old = mb.read_state(input=state)
    x = mb.cast(x=variables["x"], dtype="fp16")
    seen = mb.cond(
        pred=mb.greater(x=scalar(variables), y=np.int32(0)),
        _true_fn=lambda: mb.identity(x=old),
        _false_fn=lambda: mb.mul(x=old, y=np.float16(10)),
    )
    new = mb.slice_update(x=old, update=x, begin=[3], end=[6])
    mb.coreml_update_state(state=state, value=new)
    return [mb.cast(x=seen, dtype="fp32")]


def test_branch_over_a_state_sees_it_before_the_update(load_program: Any) -> None:
    inputs = {**X, "total": mb.state_tensor_placeholder(shape=(6,), dtype=types.fp16)}
    program = load_program(inputs, stateful)
    first = program(feeds(1))["out_0"]
    assert first.tolist() == [0] * 6
    assert program(feeds(1))["out_0"].tolist() == [0, 0, 0, 1, 2, 3]
    assert program(feeds(0))["out_0"].tolist() == [0, 0, 0, 10, 20, 30]
    assert first.tolist() == [0] * 6


def untaken(variables: dict[str, Any]) -> list[Any]:
    """A value read before a branch that names the state, and an update after it."""
    state = variables["total"]
    before = mb.read_state(input=state)
    mb.cond(
        pred=mb.greater(x=scalar(variables), y=np.int32(0)),
        _true_fn=lambda: mb.mul(x=mb.read_state(input=state), y=np.float16(2)),
        _false_fn=lambda: mb.identity(x=before),
    )
    x = mb.cast(x=variables["x"], dtype="fp16")
    new = mb.slice_update(x=mb.read_state(input=state), update=x, begin=[3], end=[6])
    mb.coreml_update_state(state=state, value=new)
    return [mb.cast(x=before, dtype="fp32")]


@pytest.mark.parametrize("number", [0, 1])
def test_update_after_a_branch_leaves_what_was_read_before(load_program: Any, number: int) -> None:
    inputs = {**X, "total": mb.state_tensor_placeholder(shape=(6,), dtype=types.fp16)}
    program = load_program(inputs, untaken)
    assert program(feeds(number))["out_0"].tolist() == [0] * 6
    assert program(feeds(number))["out_0"].tolist() == [0, 0, 0, 1, 2, 3]


def nested_loops(variables: dict[str, Any]) -> list[Any]:
    """As many rounds inside of each round."""
    limit = scalar(variables)

    def body(count: Any, value: Any) -> tuple[Any, Any]:
        _, inner = mb.while_loop(
            _cond=lambda at, kept: mb.less(x=at, y=limit),
            _body=lambda at, kept: (mb.add(x=at, y=np.int32(1)), mb.add(x=kept, y=np.float32(1))),
            loop_vars=(np.int32(0), value),
        )
        return mb.add(x=count, y=np.int32(1)), inner

    _, value = mb.while_loop(
        _cond=lambda count, value: mb.less(x=count, y=limit),
        _body=body,
        loop_vars=(np.int32(0), variables["x"]),
    )
    return [value]


def test_rounds_of_nested_loops_count_together(
    load_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_MOST_ROUNDS", 6 * 6 + 6)
    program = load_program(X, nested_loops)
    for _ in range(2):
        # Every call has the rounds for itself.
        assert program(feeds(6))["out_0"].tolist() == [37, 38, 39]
    with pytest.raises(ArtifactError, match="does not end within 42 rounds"):
        program(feeds(7))


def twins(variables: dict[str, Any]) -> list[Any]:
    """The same names in both branches."""
    x = variables["x"]
    chosen = mb.cond(
        pred=mb.greater(x=scalar(variables), y=np.int32(0)),
        _true_fn=lambda: mb.add(x=x, y=np.float32(1), name="twin"),
        _false_fn=lambda: mb.add(x=x, y=np.float32(2), name="twin"),
    )
    return [chosen]


def test_branches_may_use_the_same_names(load_program: Any) -> None:
    program = load_program(X, twins)
    assert program(feeds(1))["out_0"].tolist() == [2, 3, 4]
    assert program(feeds(0))["out_0"].tolist() == [3, 4, 5]


def test_blocks_are_counted(load_program: Any, tmp_path: Any) -> None:
    from coremltools.proto import Model_pb2

    load_program(X, branch)
    file = next((tmp_path / "model.mlpackage").rglob("*.mlmodel"))
    spec = Model_pb2.Model.FromString(file.read_bytes())
    block = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    chosen = next(item for item in block.operations if item.type == "cond")
    del chosen.blocks[1]
    file.write_bytes(spec.SerializeToString())
    with pytest.raises(ArtifactError, match=re.escape("(cond) has 1 nested blocks, not 2")):
        load(tmp_path / "model.mlpackage")
