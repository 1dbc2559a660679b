"""Running any program by names: what it tells, takes, refuses and writes."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from safetensors.torch import load_file, save_file

from exported import Run, in_process
from handmade import HALF, INT, package, tensor
from llm_coreml.runtime.tensor_files import write_tensors

half = np.float16
Command = Callable[..., Run]


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adds `x` fp16 [2] to a state, and gives the sum and `at` int32 [1] plus one."""

    def body(x: Any, at: Any, total: Any) -> Any:
        new = mb.add(x=mb.read_state(input=total), y=x)
        mb.coreml_update_state(state=total, value=new)
        # An output named as numpy's own parameter.
        return mb.identity(x=new, name="file"), mb.add(x=at, y=np.int32(1), name="next")

    inputs = {
        "x": tensor(2, dtype=HALF),
        "at": tensor(1, dtype=INT),
        "total": mb.state_tensor_placeholder(shape=(2,), dtype=HALF),
    }
    return package(tmp_path_factory.mktemp("counter") / "counter.mlpackage", inputs, body)


@pytest.fixture
def llm(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return lambda *words: in_process(capfd, monkeypatch, *words)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "given.npz"
    np.savez(path, x=np.array([1.5, -2], half), at=np.array([7], np.int64))
    return path


def test_without_inputs_it_tells_the_interface(llm: Command, counter: Path) -> None:
    done = llm("run", counter, "--format", "json")
    assert done.code == 0 and done.err == ""
    assert json.loads(done.out) == {
        "inputs": {"x": "float16 [2]", "at": "int32 [1]"},
        "outputs": {"file": "float16 [2]", "next": "int32 [1]"},
        "states": {"total": "float16 [2]"},
    }
    table = llm("run", counter).out
    assert re.search(r"^x +float16 \[2\]", table, re.M)
    assert f"llm-coreml run {counter} --inputs FILE.npz" in table


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_outputs_and_states_are_written_and_read(
    llm: Command, counter: Path, given: Path, tmp_path: Path, kind: str
) -> None:
    out, state = tmp_path / f"out.{kind}", tmp_path / f"state.{kind}"
    words = ("run", counter, "--inputs", given, "-o", out, "--state-out", state)
    first = llm(*words, "--format", "json")
    assert first.code == 0, first.err
    assert json.loads(first.out)["outputs"] == {
        "file": {"dtype": "float16", "shape": [2], "lowest": -2.0, "highest": 1.5},
        "next": {"dtype": "int32", "shape": [1], "lowest": 8.0, "highest": 8.0},
    }
    second = llm(*words, "--state-in", state, "--overwrite")
    assert second.code == 0, second.err
    found = (
        dict(np.load(out)) if kind == "npz" else {k: v.numpy() for k, v in load_file(out).items()}
    )
    # The state has been added to twice.
    assert found["file"].tolist() == [3.0, -4.0] and found["file"].dtype == half
    assert found["next"].tolist() == [8] and found["next"].dtype == np.int32
    assert {path.name for path in tmp_path.iterdir()} == {given.name, out.name, state.name}


def test_a_safetensors_file_feeds_it_as_well(llm: Command, counter: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.safetensors"
    save_file(
        {"x": torch.ones(2, dtype=torch.float16), "at": torch.ones(1, dtype=torch.int32)}, path
    )
    assert llm("run", counter, "-i", path).code == 0


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"x": half([1, 2])}, "The input 'at' is missing; give int32 [1]."),
        ({"x": half([1, 2]), "a": [1]}, "no input 'a', only 'x', 'at'. Did you mean 'at'?"),
        ({"x": [1.0, 2.0], "at": [1]}, "'x' is float64 [2]; the program takes float16 [2]."),
        ({"x": half([1]), "at": [1]}, "'x' is float16 [1]; the program takes float16 [2]."),
        ({"x": half([1, 2]), "at": [2**31]}, "'at' is int64 [1]; the program takes int32 [1]."),
        ({"x": half([1, 2]), "at": [True]}, "'at' is bool [1]; the program takes int32 [1]."),
        ({"x": half([1, 2]), "at": ["a"]}, "cannot be read: "),
        ({"x": half([1, 2]), "at": np.array([print], object)}, "allow_pickle=False"),
    ],
    ids=["missing", "extra", "float64", "shape", "large", "bool", "text", "pickle"],
)
def test_inputs_that_do_not_fit(
    llm: Command, counter: Path, tmp_path: Path, arrays: dict[str, Any], told: str
) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    done = llm("run", counter, "-i", tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert done.code == 2 and told in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "out.npz").exists()


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_not_opened(llm: Command, counter: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([Trap(tmp_path / "mark")], object))
    assert llm("run", counter, "-i", tmp_path / "in.npz").code == 2
    assert not (tmp_path / "mark").exists()


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        # Claims 4 TiB, holds nothing.
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
        header = header.ljust(117) + b"\n"
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def truncated(path: Path) -> None:
    held = io.BytesIO()
    np.savez(held, x=np.zeros(1000))
    path.write_bytes(held.getvalue()[:500])


@pytest.mark.parametrize(
    "write", [bomb, truncated, Path.touch, Path.mkdir], ids=lambda f: f.__name__
)
def test_damaged_inputs(
    llm: Command, counter: Path, tmp_path: Path, write: Callable[[Path], None]
) -> None:
    for name in ("in.npz", "in.safetensors"):
        write(tmp_path / name)
        done = llm("run", counter, "-i", tmp_path / name)
        assert done.code == 2 and done.err.startswith(f"Error: '{tmp_path / name}' ")
        assert len(done.err.splitlines()) == 1


def test_misuse(llm: Command, counter: Path, given: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    for words, code, told in (
        (("-o", out), 2, "--output, --state-in and --state-out need --inputs."),
        (("-i", given, "-o", tmp_path / "out.txt"), 2, "ends in neither .npz nor .safetensors"),
        (("-i", "gone.npz"), 2, "'gone.npz' is no file"),
        (("-i", given, "-o", out, "--state-out", out), 2, "are the same file; give two."),
        (("-i", given, "--method", "f", "--state-in", out), 2, "leave --method out."),
        (("--method", "forward"), 2, "is a .mlpackage, which has no methods; give --function."),
        (("--function", "man"), 7, "has no function 'man', only main. Did you mean 'main'?"),
        (("--memory-budget", "lots"), 2, "'lots' is no number of bytes such as 4GB"),
        (("--compile",), 2, "compile the mode 'fp32'"),
        (("-i", given, "--state-in", given), 2, "The snapshot holds the states ['at', 'x']"),
    ):
        done = llm("run", counter, *words)
        assert done.code == code and told in done.err, words
        assert done.out == "" and not out.exists()


@pytest.mark.parametrize("option", ["--output", "--state-out"])
def test_an_existing_file_is_replaced_only_when_asked(
    llm: Command, counter: Path, given: Path, tmp_path: Path, option: str
) -> None:
    out = tmp_path / "out.npz"
    out.write_text("precious")
    done = llm("run", counter, "-i", given, option, out)
    assert done.code == 6 and "exists already" in done.err and out.read_text() == "precious"
    assert llm("run", counter, "-i", given, option, out, "--overwrite").code == 0
    assert zipfile.is_zipfile(out)


def test_a_folder_that_cannot_be_written(
    llm: Command, counter: Path, given: Path, tmp_path: Path
) -> None:
    done = llm("run", counter, "-i", given, "-o", tmp_path / "gone" / "out.npz")
    assert done.code == 6 and "is no folder that can be written to" in done.err


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, kind: str) -> None:
    from llm_coreml.errors import OutputError

    out = tmp_path / f"out.{kind}"
    out.write_text("precious")
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, previous[1]))
    try:
        with pytest.raises(OutputError, match=r"The disk that holds .* is full"):
            write_tensors(out, {"x": torch.zeros(1 << 16)}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert out.read_text() == "precious" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("word", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 512 << 20), ("1.5g", 15 * 10**8), ("4000", 4000)],
)
def test_amounts_of_memory(word: str, size: int) -> None:
    import click

    from llm_coreml.cli.options import memory

    context, parameter = click.Context(click.Command("x")), click.Option(["--x"])
    assert memory(context, parameter, word) == size


def test_a_method_of_a_language_model(llm: Command, bundle: Path, tmp_path: Path) -> None:
    from llm_coreml import load

    np.savez(tmp_path / "in.npz", input_0=np.array([[5]]), input_1=np.array([0]))
    out = tmp_path / "out.npz"
    done = llm("run", bundle, "--method", "forward", "-i", tmp_path / "in.npz", "-o", out)
    assert done.code == 0, done.err
    expected = load(bundle).logits([5]).numpy()
    np.testing.assert_array_equal(np.load(out)["output_0"][0], expected)
    interface = json.loads(llm("run", bundle, "--format", "json").out)
    assert "int32 [1, 1] or [1, 8]" in interface["inputs"].values()
    assert interface["states"].keys() == {"cache_keys", "cache_values"}
    missing = llm("run", bundle, "--method", "backward")
    assert missing.code == 7 and "has no method 'backward', only" in missing.err
