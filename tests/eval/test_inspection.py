"""Where values overflow and how far they are from it, on programs whose values are known."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from rich.console import Console

from exported import in_process
from handmade import HALF, INT, program, tensor
from llm_coreml.cli.options import MODES
from llm_coreml.cli.tables import inspection_table
from llm_coreml.errors import ConfigError
from llm_coreml.eval.inspection import (
    Difference,
    Inspection,
    Result,
    check_threshold,
    inspect_numerics,
)
from llm_coreml.reference.observe.watch import Observed, Watch
from llm_coreml.reference.program.numerics import MODES as KNOWN_MODES

half = np.float16


def watched(loaded: Any, *calls: dict[str, torch.Tensor]) -> dict[str, Observed]:
    """Return what a watch notes over `calls`, by name."""
    watch = Watch(loaded)
    with loaded.observed(watch):
        for given in calls:
            loaded(given)
    return {item.name: item for item in watch.operations}


def test_overflow_begins_where_finite_numbers_stop_fitting(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        wide = mb.mul(x=x, y=half(300), name="wide")
        over = mb.mul(x=wide, y=half(300), name="over")
        passed = mb.relu(x=over, name="passed")
        return mb.sub(x=passed, y=over, name="gone")

    loaded = program(tmp_path, {"x": tensor(2, dtype=HALF)}, body)
    found = watched(loaded, {"x": torch.tensor([1.0, -0.5], dtype=torch.float16)})
    assert found["wide"].begins == () and found["wide"].largest == 300
    # 1 * 300 * 300 = 90000 is beyond 65504; -45000 is not, and 44992 is its neighbour in fp16.
    assert found["over"].begins == ("inf",) and found["over"].largest == 44992
    assert found["passed"].begins == ()
    # inf - inf
    assert found["gone"].begins == ("nan",)
    # No call reaches it, so nothing is noted.
    calm = watched(loaded, {"x": torch.tensor([0.5, -0.5], dtype=torch.float16)})
    assert not any(item.begins for item in calm.values())
    assert calm["over"].largest == 44992 and calm["over"].headroom == 65504 / 44992


def test_in_fp32_nothing_overflows_and_the_true_size_is_told(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        return mb.mul(x=mb.mul(x=x, y=half(300)), y=half(300), name="over")

    loaded = program(tmp_path, {"x": tensor(2, dtype=HALF)}, body, mode="fp32")
    found = watched(loaded, {"x": torch.ones(2, dtype=torch.float16)})
    assert found["over"].largest == 90000 and not any(item.begins for item in found.values())


@pytest.mark.parametrize("fill", [-np.inf, -40000.0, -60000.0])
def test_masks_are_no_activations(tmp_path: Path, fill: float) -> None:
    full = np.full((2, 3), fill, half)

    def body(x: Any, at: Any) -> Any:
        blocked = mb.greater(x=np.array([[0, 1, 2]], np.int32), y=at)
        chosen = mb.select(cond=blocked, a=full, b=np.zeros((2, 3), half), name="chosen")
        scores = mb.mul(x=x, y=half(8), name="scores")
        masked = mb.add(x=scores, y=chosen, name="masked")
        return mb.softmax(x=masked, axis=-1, name="weights")

    inputs = {"x": tensor(2, 3, dtype=HALF), "at": tensor(2, 1, dtype=INT)}
    loaded = program(tmp_path, inputs, body)
    x = torch.tensor([[1, -2, 3], [4, -5, 6]], dtype=torch.float16)
    found = watched(loaded, {"x": x, "at": torch.tensor([[0], [1]], dtype=torch.int32)})
    assert not any(item.begins for item in found.values())
    # Rows keep 1 * 8, and 4 * 8 and -5 * 8, where nothing is masked.
    assert found["scores"].largest == 48 and found["masked"].largest == 40
    assert found["weights"].largest == 1


def test_a_mask_that_itself_overflows_is_told(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        return mb.add(x=x, y=np.full((1, 2), -65504, half), name="masked")

    loaded = program(tmp_path, {"x": tensor(1, 2, dtype=HALF)}, body)
    scores = torch.tensor([[8.0, -16.0]], dtype=torch.float16)
    # -65504 + 8 rounds back; -65504 - 16 is half a step beyond the last number, and rounds to -inf.
    assert watched(loaded, {"x": scores})["masked"].begins == ("inf",)
    assert watched(loaded, {"x": scores.abs()})["masked"].begins == ()


def test_a_masked_row_that_becomes_nan_is_told(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        masked = mb.add(x=x, y=np.full((1, 2), -np.inf, half), name="masked")
        return mb.softmax(x=masked, axis=-1, name="weights")

    loaded = program(tmp_path, {"x": tensor(1, 2, dtype=HALF)}, body)
    found = watched(loaded, {"x": torch.ones(1, 2, dtype=torch.float16)})
    assert found["masked"].begins == () and found["weights"].begins == ("nan",)


def test_a_large_input_counts_and_movement_does_not_grow(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        turned = mb.transpose(x=x, perm=[1, 0], name="turned")
        return mb.mul(x=turned, y=half(2), name="doubled")

    loaded = program(tmp_path, {"x": tensor(1, 2, dtype=HALF)}, body)
    found = watched(loaded, {"x": torch.tensor([[20000.0, 1.0]], dtype=torch.float16)})
    assert found["turned"].largest == 20000 and not found["turned"].grows
    assert found["doubled"].largest == 40000 and found["doubled"].grows


def test_a_state_that_was_restored_is_looked_at_again(tmp_path: Path) -> None:
    def body(x: Any, total: Any) -> Any:
        old = mb.read_state(input=total, name="old")
        new = mb.mul(x=mb.add(x=old, y=x, name="sum"), y=half(30000), name="new")
        mb.coreml_update_state(state=total, value=new)
        return mb.identity(x=new, name="out")

    inputs = {
        "x": tensor(1, dtype=HALF),
        "total": mb.state_tensor_placeholder(shape=(1,), dtype=HALF),
    }
    loaded = program(tmp_path, inputs, body)
    watch = Watch(loaded)
    with loaded.observed(watch):
        loaded({"x": torch.full((1,), 2.0, dtype=torch.float16)})
        loaded.restore({"total": torch.full((1,), -np.inf, dtype=torch.float16)})
        loaded({"x": torch.zeros(1, dtype=torch.float16)})
        loaded.reset()
        assert not any(item.begins for item in watch.operations), "infinity came from outside"
        # 3 * 30000 is beyond 65504.
        loaded({"x": torch.full((1,), 3.0, dtype=torch.float16)})
    assert [item.name for item in watch.operations if item.begins] == ["new"]


def test_layers_are_counted_by_attention(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        first = mb.softmax(x=x, axis=-1, name="one")
        return mb.softmax(x=mb.mul(x=first, y=half(3), name="between"), axis=-1, name="two")

    given = {"x": torch.ones(1, 2, dtype=torch.float16)}
    found = watched(program(tmp_path, {"x": tensor(1, 2, dtype=HALF)}, body), given, given)
    assert {name: item.layer for name, item in found.items()} == {"one": 0, "between": 1, "two": 1}


def test_integers_are_left_out(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        return mb.add(x=x, y=np.int32(1 << 20), name="sum")

    loaded = program(tmp_path, {"x": tensor(2, dtype=INT)}, body)
    assert watched(loaded, {"x": torch.ones(2, dtype=torch.int32)}) == {}


# The command


def test_modes_are_those_of_the_runtime() -> None:
    assert MODES == KNOWN_MODES


def test_inspect_json_and_table(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    text_file: Path,
) -> None:
    words = ("inspect", bundle, "--numerics", "--text", text_file, "--tokens", "20", "--top", "3")
    done = in_process(capfd, monkeypatch, *words, "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["tokens"] == 20 and found["text"] == "tëxt.txt" and found["against"] == "fp32"
    assert found["overflows"] == [] and found["first"] is None and len(found["nearest"]) == 3
    sizes = [item["largest"] for item in found["nearest"]]
    assert sizes == sorted(sizes, reverse=True)
    # One layer of attention: what comes before it, and what follows.
    assert [item["layer"] for item in found["layers"]] == [0, 1]
    # fp16 keeps 11 bits: a rounding shows, a defect would be larger.
    assert all(2**-13 < item["error"] < 1e-2 for item in found["layers"])
    assert all(abs(item["beside"] / item["largest"] - 1) < 1e-2 for item in found["nearest"])
    table = in_process(capfd, monkeypatch, *words).out
    assert "no value is inf or NaN" in table and "nowhere do declared and fp32 part" in table
    for item in found["nearest"]:
        assert re.search(rf"{item['largest']:.5g} .* {re.escape(item['name'])} ", table)


def test_a_low_threshold_finds_the_first_rounding(bundle: Path, text_file: Path) -> None:
    found = inspect_numerics(bundle, text=text_file, tokens=9, threshold=0.0)
    assert found.first is not None and found.first.layer == 0
    alone = inspect_numerics(bundle, text=text_file, tokens=9, against=None)
    assert alone.layers == () and alone.first is None
    assert [item.largest for item in alone.nearest] == [item.largest for item in found.nearest]


def test_the_table_tells_where_overflow_begins() -> None:
    over = Result("big", "mul", 3, "fp16", 60000.0, ("inf",), 90000.0)
    parted = Difference("big", "mul", 3, None)
    found = Inspection(
        program="model.pte",
        text="text",
        tokens=5,
        device="cpu",
        operations=7,
        overflows=(over,),
        nearest=(over,),
        against="fp32",
        threshold=0.01,
        first=parted,
        layers=(parted,),
    )
    console = Console(width=100)
    with console.capture() as printed:
        console.print(inspection_table(found))
    told = printed.get()
    assert re.search(r"^inf +90000 +3 +big \(mul\)", told, re.M)
    # 65504 / 60000
    assert re.search(r"^60000 +1\.1x +3 +big \(mul\)", told, re.M)
    assert "part by more than 0.01 first at big (mul, after attention 3)" in told
    assert re.search(r"^inf or NaN +3 +big \(mul\)", told, re.M)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), 2, "Say what to inspect: --numerics or --compatibility."),
        (("--numerics", "--tokens", "0"), 2, "--tokens is 0; it must be a whole number from 1"),
        (("--numerics", "--top", "-1"), 2, "--top is -1; it must be a whole number from 0"),
        (
            ("--numerics", "--threshold", "nan"),
            2,
            "--threshold is nan; give a number of 0 or more.",
        ),
        (("--numerics", "--device", "toaster"), 2, "The device 'toaster' cannot be used here"),
        (("--numerics", "--text", "gone.txt"), 2, "--text 'gone.txt' cannot be read"),
        (("--numerics", "--ids", "gone.txt"), 2, "--ids 'gone.txt' cannot be read"),
        (("--numerics", "--ids", "a", "--text", "b"), 2, "two sources of tokens; give one"),
        (("--numerics", "--against", "declared"), 2, "'declared' is not one of"),
    ],
)
def test_inspect_misuse(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    words: tuple[str, ...],
    code: int,
    told: str,
) -> None:
    done = in_process(capfd, monkeypatch, "inspect", bundle, *words)
    assert done.code == code and told in done.err.splitlines()[-1] and done.out == ""


def test_a_program_alone_needs_ids(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    tmp_path: Path,
) -> None:
    alone = tmp_path / "alone.pte"
    alone.write_bytes((bundle / "model.pte").read_bytes())
    words = ("inspect", alone, "--numerics", "--against", "none", "--format", "json")
    refused = in_process(capfd, monkeypatch, *words)
    assert refused.code == 2 and "or tokens with --ids FILE." in refused.err
    ids = tmp_path / "ids.txt"
    ids.write_text("0, 5 17\n99 4")
    done = in_process(capfd, monkeypatch, *words, "--ids", ids)
    assert done.code == 0 and json.loads(done.out)["tokens"] == 4
    for content, told in (("0 -1", "'-1', which is no token"), ("0 9999 1", "Token 9999 is")):
        ids.write_text(content)
        refused = in_process(capfd, monkeypatch, *words, "--ids", ids)
        assert refused.code == 2 and told in refused.err


@pytest.mark.parametrize("value", ["1", None, math.nan, math.inf, -(10**5000)], ids=range(5))
def test_thresholds_that_are_no_numbers(value: Any) -> None:
    with pytest.raises(ConfigError, match="give a number of 0 or more"):
        check_threshold(value)
