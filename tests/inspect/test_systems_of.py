"""Which systems run a program, told of any program, and refused with what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import coremltools as ct
import pytest
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types

from exported import in_process
from llm_coreml.artifact.packages import model_of_folder
from llm_coreml.errors import ArtifactError, UnsupportedError
from llm_coreml.inspect.contents import contents
from llm_coreml.inspect.extraction import extract
from llm_coreml.inspect.systems_of import check_system, systems_of
from programs import build_program, save


def test_a_bundle_says_from_which_system_on_it_runs(bundle: Path) -> None:
    (part,) = systems_of(bundle)
    assert part.part == "forward, partition 0"
    assert part.asked.declared == part.asked.needed == "iOS18"
    assert check_system(bundle, "visionOS2") == (part,)
    (delegate,) = contents(bundle).methods["forward"]
    assert delegate.model is not None
    assert (delegate.model.declared, delegate.model.needed) == ("iOS18", "iOS18")
    with pytest.raises(UnsupportedError) as caught:
        check_system(bundle, "macOS14")
    told = str(caught.value)
    assert "does not run on macOS14: it is written for iOS18" in told
    assert "unknown opset; it uses a state ('cache_" in told
    assert told.endswith("export it with --minimum-os iOS18 or without states.")


def test_a_program_that_could_run_on_older_systems_is_told_so(
    portable_pte: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="needs that; export it with --minimum-os iOS17"):
        check_system(portable_pte, "iOS17")
    (path, *_) = extract(portable_pte, tmp_path / "out").models
    (part,) = systems_of(tmp_path / "out" / path.path)
    assert part.asked == systems_of(portable_pte)[0].asked


def test_other_backends_ask_nothing(xnnpack_pte: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no Core ML model"):
        systems_of(xnnpack_pte)


def mixed_package(path: Path) -> Path:
    """Write a sum of fp32 and fp16, which no converter should."""
    inputs = {name: mb.placeholder(shape=(2, 4), dtype=types.fp32) for name in "xy"}
    program = build_program(inputs, lambda v: [mb.add(x=v["x"], y=v["y"])], ct.target.iOS18)
    save(program, path, ct.target.iOS18)
    file = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec: Any = ct.proto.Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    spec.mlProgram.functions["main"].inputs[1].type.tensorType.dataType = 10  # fp16
    file.write_bytes(spec.SerializeToString())
    return path


def test_operands_of_two_types_get_advice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mixed_package(tmp_path / "mixed.mlpackage")
    assert model_of_folder(path).functions
    with pytest.raises(UnsupportedError, match=r"add .* in fp32 and y in fp16.*the epsilon of a"):
        check_system(path, "iOS26")
    done = in_process(capfd, monkeypatch, "inspect", path, "--compatibility")
    assert done.code == 0 and "No system compiles add" in done.out
    assert "--compute-precision" in done.out
    done = in_process(capfd, monkeypatch, "run", path)
    assert done.code == ArtifactError.exit_code
    assert "mixes the element types fp16, fp32" in done.err and "--compute-precision" in done.err


def test_the_command_line(
    bundle: Path,
    sample_pte: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = in_process(capfd, monkeypatch, "inspect", sample_pte, "--compatibility")
    assert done.code == 0 and "read_state" in done.out and "operations of CoreML8" in done.out
    words = ("inspect", bundle, "--compatibility", "--format", "json")
    (part,) = json.loads(in_process(capfd, monkeypatch, *words).out)["parts"]
    assert part["declared"] == "iOS18" and part["needs"][0]["system"] == "iOS18"
    for system, code in (("iOS26", 0), ("tvOS17", 5), ("iOS12", 2), ("iOS15", 5)):
        words = ("inspect", bundle, "--compatibility", "--minimum-os", system)
        assert in_process(capfd, monkeypatch, *words).code == code, system
    for words in (("--minimum-os", "iOS18", "--numerics"), ("--numerics", "--compatibility"), ()):
        assert in_process(capfd, monkeypatch, "inspect", bundle, *words).code == 2
    shown = in_process(capfd, monkeypatch, "show", bundle).out
    assert "runs from" in shown and "what it uses begins with iOS18" in shown
