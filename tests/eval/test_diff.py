"""Where two programs part: aligned, run side by side, and compared, on known differences."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb

from artifacts import Artifact
from exported import in_process
from handmade import HALF, program, tensor
from llm_coreml.errors import ArtifactError, ConfigError
from llm_coreml.eval.difference import diff
from llm_coreml.reference import CoreMLProgram
from llm_coreml.reference.observe.alignment import Trace, Traced, align
from llm_coreml.reference.observe.divergence import Parting, relative_error
from llm_coreml.reference.observe.lockstep import Lockstep
from llm_coreml.reference.observe.watch import Watch
from tiny import tokens_for

half = np.float16
Given = dict[str, torch.Tensor]


def traced(loaded: CoreMLProgram, given: Given) -> list[Traced]:
    trace = Trace()
    with loaded.observed(trace):
        loaded(given)
    loaded.reset()
    return trace.operations


def compared(
    first: CoreMLProgram, second: CoreMLProgram, *calls: Given
) -> tuple[Parting, list[tuple[str, str]]]:
    """Run both on `calls`; return the errors, and the names of paired operations."""
    one, other = traced(first, calls[0]), traced(second, calls[0])
    pairs = align(one, other)
    parting = Parting(one)
    lockstep = Lockstep(first, second, pairs, parting.compare, (Watch(first), Watch(second)))
    for given in calls:
        results = lockstep.run(lambda g=given: first(g), lambda g=given: second(g))  # type: ignore[misc]
        assert all(isinstance(result, dict) for result in results)
    return parting, [(one[at].name, other[to].name) for at, to in pairs]


def chain(factor: float, extra: bool = False) -> Callable[[Any], Any]:
    """Return a program: double, attend, times `factor`, attend, and end; `extra` scales first."""

    def body(x: Any) -> Any:
        value = mb.mul(x=x, y=half(2), name="double")
        if extra:
            value = mb.mul(x=value, y=half(0.5), name="scaled")
            value = mb.sqrt(x=value, name="root")
        value = mb.softmax(x=value, axis=-1, name="attend_1")
        value = mb.mul(x=value, y=half(factor), name="times")
        value = mb.softmax(x=value, axis=-1, name="attend_2")
        return mb.relu(x=value, name="end")

    return body


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., CoreMLProgram]:
    inputs = {"x": tensor(1, 4, dtype=HALF)}
    return lambda body, mode="declared": program(tmp_path, inputs, body, mode)


GIVEN = {"x": torch.tensor([[1, 2, 0.5, 0.25]], dtype=torch.float16)}


def test_equal_programs_do_not_part(make: Callable[..., CoreMLProgram]) -> None:
    parting, pairs = compared(make(chain(3)), make(chain(3)), GIVEN, GIVEN)
    names = ["double", "attend_1", "times", "attend_2", "end"]
    assert pairs == [(name, name) for name in names]
    assert [(item.name, item.errors) for item in parting.operations] == [
        (name, [0.0, 0.0]) for name in names
    ]
    assert parting.first(0.0) is None


def test_programs_part_where_one_operation_differs(make: Callable[..., CoreMLProgram]) -> None:
    parting, _ = compared(make(chain(4)), make(chain(5)), GIVEN)
    first = parting.first(1e-2)
    assert first is not None and (first.name, first.type, first.layer) == ("times", "mul", 1)
    # max|4v - 5v| / max|4v|, each rounded to fp16.
    assert first.errors == [pytest.approx(0.25, rel=2**-10)]
    assert parting.first(0.5) is None
    layers = parting.by_layer()
    assert [item.layer for item in layers] == [0, 1, 2]
    assert layers[0].error == 0 and layers[1].name == "times" and 0 < layers[2].error < 0.25


def test_additional_operations_stand_alone(make: Callable[..., CoreMLProgram]) -> None:
    _, pairs = compared(make(chain(3)), make(chain(3, extra=True)), GIVEN)
    assert ("times", "times") in pairs and ("attend_2", "attend_2") in pairs
    assert not any("root" in pair for pair in pairs) and len(pairs) == 5
    assert ("double", "double") in pairs


def operation(name: str, kind: str, reads: Sequence[int], write: int) -> Traced:
    return Traced(name, (kind, ((2,),)), 0, tuple(reads), (write,))


def test_like_operations_of_different_origin_are_no_pair() -> None:
    # `first` multiplies what an exp gives, `second` what a tanh gives; the exp is alone there.
    first = [operation("e", "exp", (0,), 1), operation("t", "tanh", (0,), 2),
             operation("m", "mul", (1,), 3)]  # fmt: skip
    second = [operation("e", "exp", (0,), 1), operation("t", "tanh", (0,), 2),
              operation("m", "mul", (2,), 3)]  # fmt: skip
    assert align(first, second) == [(0, 0), (1, 1)]
    assert align(first, first) == [(0, 0), (1, 1), (2, 2)]


def test_names_settle_ties() -> None:
    first = [operation("b", "mul", (0,), 1)]
    second = [operation(name, "mul", (0,), 1) for name in "abc"]
    second = [operation("z", "exp", (0,), 9), *second, operation("y", "tanh", (0,), 9)]
    assert align(first, second) == [(0, 2)]


def test_alignment_is_the_longest_common_subsequence() -> None:
    def brute(one: str, other: str) -> int:
        if not one or not other:
            return 0
        if one[0] == other[0]:
            return 1 + brute(one[1:], other[1:])
        return max(brute(one[1:], other), brute(one, other[1:]))

    draw = np.random.default_rng(0)
    for _ in range(50):
        one, other = ("".join(draw.choice(list("abc"), draw.integers(0, 9))) for _ in range(2))
        sides = [[operation(f"{s}{at}", kind, (), at) for at, kind in enumerate(word)]
                 for s, word in (("o", one), ("p", other))]  # fmt: skip
        pairs = align(*sides)
        assert len(pairs) == brute(one, other)
        assert all(one[at] == other[to] for at, to in pairs)
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(pairs))


def test_states_are_compared_over_calls(tmp_path: Path) -> None:
    def adding(extra: float) -> Callable[..., Any]:
        def body(x: Any, total: Any) -> Any:
            grown = mb.add(x=mb.read_state(input=total, name="old"), y=x, name="sum")
            new = mb.mul(x=grown, y=half(extra), name="new")
            mb.coreml_update_state(state=total, value=new)
            return mb.identity(x=new, name="out")

        return body

    inputs = {
        "x": tensor(1, dtype=HALF),
        "total": mb.state_tensor_placeholder(shape=(1,), dtype=HALF),
    }
    one, other = program(tmp_path, inputs, adding(1)), program(tmp_path, inputs, adding(2))
    given = {"x": torch.ones(1, dtype=torch.float16)}
    parting, _ = compared(one, other, given, given)
    errors = {item.name: item.errors for item in parting.operations}
    # 1 and 2 after the first call; 2 and (2 + 1) * 2 after the second.
    assert errors["sum"] == [0.0, 0.5] and errors["new"] == [1.0, 2.0]
    first = parting.first(0.6)
    assert first is not None and first.name == "new"


def test_modes_part_where_fp16_overflows(make: Callable[..., CoreMLProgram]) -> None:
    def body(x: Any) -> Any:
        near = mb.mul(x=x, y=half(30000), name="near")
        return mb.mul(x=near, y=half(4), name="over")

    parting, _ = compared(make(body), make(body, "fp32"), GIVEN)
    first = parting.first(1e-2)
    assert first is not None and first.name == "over" and first.error == math.inf


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_program_ends_both(make: Callable[..., CoreMLProgram], failing: int) -> None:
    programs = [make(chain(3)), make(chain(3))]
    trace = traced(programs[0], GIVEN)
    pairs = [(at, at) for at in range(len(trace))]
    ignore: Any = lambda *_: None  # noqa: E731

    def fail() -> Any:
        programs[failing]({"x": GIVEN["x"]})
        raise ArtifactError("a made-up failure")

    calls: list[Callable[[], Any]] = [lambda: programs[0](GIVEN), lambda: programs[1](GIVEN)]
    calls[failing] = fail
    with pytest.raises(ArtifactError, match="made-up"):
        Lockstep(*programs, pairs, ignore, (ignore, ignore)).run(*calls)

    # Before any pair, too.
    def refuse() -> Any:
        raise ArtifactError("another failure")

    calls[failing] = refuse
    with pytest.raises(ArtifactError, match="another"):
        Lockstep(*programs, pairs, ignore, (ignore, ignore)).run(*calls)


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.nan, 2.0], [math.nan, 1.0], 0.5),
        ([-math.inf, 2.0], [-math.inf, 1.0], 0.5),
        ([math.inf, 1.0], [5.0, 1.0], math.inf),
        ([math.nan, 1.0], [5.0, 1.0], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([0.0], [0.0], 0.0),
        ([0.0], [1e-9], math.inf),
        ([], [], 0.0),
    ],
)
def test_relative_error(first: list[float], second: list[float], error: float) -> None:
    assert relative_error(torch.tensor(first), torch.tensor(second)) == error


def test_what_fp16_rounds_to_zero_is_no_difference() -> None:
    zero, tiny = torch.zeros(1, dtype=torch.float16), torch.full((1,), 1e-9)
    assert relative_error(zero, tiny) == pytest.approx(1e-9 * 2**14)
    # Integers are exact, and so is their difference.
    large = torch.tensor([2**24], dtype=torch.int32)
    assert relative_error(large, large + 1) == 2**-24


# Two exports


def test_an_export_does_not_differ_from_itself(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    text_file: Path,
) -> None:
    words = ("diff", bundle, bundle / "model.pte", "--text", text_file, "--tokens", "20")
    done = in_process(capfd, monkeypatch, *words, "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["equal"] and found["first"] is None and found["alone"] == [{}, {}]
    one, other = found["qualities"]
    assert one["perplexity"] == other["perplexity"] and other["mean_kl"] == 0
    assert "no difference: " in in_process(capfd, monkeypatch, *words).out


def test_exports_for_two_targets(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quantized: Callable[[str], Artifact],
    tmp_path: Path,
) -> None:
    one, other = quantized("int4-group-32"), quantized("codebook-4")
    tokens = tokens_for(96, 25)
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(map(str, tokens)))
    words = ("diff", one.path, other.path, "--ids", ids)
    done = in_process(capfd, monkeypatch, *words, "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert not found["equal"] and found["tokens"] == 24 and found["text"] == "ids.txt"
    # One layer: fused attention on one side, its parts on the other.
    assert found["alone"][0] == {"scaled_dot_product_attention": 1}
    assert found["alone"][1].keys() >= {"softmax", "matmul"}
    # The token table is the same; the first projection has other codes.
    assert found["first"]["type"] == "linear" and found["first"]["layer"] == 0
    assert [item["layer"] for item in found["layers"]] == [0, 1]
    qualities = found["qualities"]
    assert [quality["name"] for quality in qualities] == ["first", "second"]
    rows = [artifact.runner().logits(tokens[:-1]).double() for artifact in (one, other)]
    for logits, quality in zip(rows, qualities, strict=True):
        cost = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]))
        assert quality["perplexity"] == pytest.approx(math.exp(cost), rel=1e-6)
    logs = [logits.log_softmax(-1) for logits in rows]
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert qualities[0]["mean_kl"] is None
    assert qualities[1]["mean_kl"] == pytest.approx(float(divergence), rel=1e-6)
    table = in_process(capfd, monkeypatch, *words).out
    assert "only in A: 1 scaled_dot_product_attention" in table
    assert f"A and B part by more than 0.01 first at {found['first']['name']} (linear" in table


def test_diff_misuse(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    tmp_path: Path,
) -> None:
    alone = tmp_path / "alone.pte"
    alone.write_bytes((bundle / "model.pte").read_bytes())
    for words, code, told in (
        ((bundle, tmp_path / "gone"), 7, f"'{tmp_path}/gone' cannot be read"),
        ((alone, alone), 2, f"'{alone}' comes without a tokenizer"),
        ((bundle, alone, "--threshold", "-1"), 2, "--threshold is -1.0; give a number of 0"),
        ((bundle,), 2, "Missing argument 'B'"),
    ):
        done = in_process(capfd, monkeypatch, "diff", *words)
        assert done.code == code and told in done.err.splitlines()[-1] and done.out == ""


def test_diff_needs_one_vocabulary(
    quantized: Callable[[str], Artifact], three_layers: Artifact
) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary of 96 tokens and .* one of 257; give two"):
        diff(quantized("int4-group-32").path, three_layers.path)
