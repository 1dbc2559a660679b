"""The Core ML models of an artifact as files: what coremltools reads, the same on two runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import pytest
import torch
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

import llm_coreml
from exported import in_process
from llm_coreml.artifact import pte
from llm_coreml.artifact.inmemoryfs import pack, unpack
from llm_coreml.artifact.mapped import map_folder
from llm_coreml.errors import ArtifactError, OutputError
from llm_coreml.inspect.extraction import INDEX, ModelUse, extract
from llm_coreml.reference import load, load_method

MANIFEST = "model.mlpackage/Manifest.json"


def files_of(path: Path) -> dict[str, bytes]:
    return {name: bytes(content) for name, content in map_folder(path).items()}


def opened(path: Path, **chosen: str) -> ct.models.MLModel:
    return ct.models.MLModel(str(path), skip_model_load=True, **chosen)


# What comes out


def test_a_bundle_gives_the_model_that_coremltools_opens(bundle: Path, tmp_path: Path) -> None:
    found = llm_coreml.extract(bundle, tmp_path / "models")
    (model,) = found.models
    assert found.folder == str(tmp_path / "models") and model.path == "model-0.mlpackage"
    (delegate,) = pte.read_delegates(bundle / "model.pte")
    inside = {
        name.removeprefix("model.mlpackage/"): bytes(content)
        for name, content in unpack(delegate.data).items()
        if name.startswith("model.mlpackage/")
    }
    assert files_of(tmp_path / "models" / model.path) == inside
    assert model.files == {name: len(content) for name, content in inside.items()}
    names = ("tokens", "start_pos", "last_pos")
    (use,) = model.used_by
    assert (use.method, use.partition, use.function, use.inputs) == ("forward", 0, "main", names)
    read = opened(tmp_path / "models" / model.path)
    assert [each.name for each in read.get_spec().description.input] == list(names)
    assert read.weights_dir is not None and Path(read.weights_dir, "weight.bin").is_file()


def test_two_runs_give_the_same_bytes(bundle: Path, shared_pte: Path, tmp_path: Path) -> None:
    for number, artifact in enumerate((bundle, shared_pte)):
        first, second = (tmp_path / f"{number}{name}" for name in "ab")
        extract(artifact, first)
        extract(str(artifact), str(second))
        assert files_of(first) == files_of(second)
        extract(artifact, first, overwrite=True)
        assert files_of(first) == files_of(second)


def test_a_shared_model_is_written_once_with_its_functions(
    shared_pte: Path, tmp_path: Path
) -> None:
    found = extract(shared_pte, tmp_path / "out")
    (model,) = found.models
    assert [(use.method, use.partition, use.function) for use in model.used_by] == [
        ("decode", 0, "decode"),
        ("prefill", 0, "prefill"),
    ]
    assert json.loads((tmp_path / "out" / INDEX).read_text())["models"][0]["path"] == model.path
    path = tmp_path / "out" / model.path
    for use, rows in zip(model.used_by, (1, 4), strict=True):
        opened(path, function_name=use.function)
        x = torch.randn(rows, 8)
        (given,) = use.inputs
        expected = load_method(shared_pte, use.method)(x)
        (result,) = load(path, use.function)({given: x}).values()
        assert torch.equal(result, expected)


def test_every_partition_is_written(portable_pte: Path, tmp_path: Path) -> None:
    found = extract(portable_pte, tmp_path / "out")
    assert [model.path for model in found.models] == ["model-0.mlpackage", "model-1.mlpackage"]
    assert [use.partition for model in found.models for use in model.used_by] == [0, 1]
    folders = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert folders == {"model-0.mlpackage", "model-1.mlpackage", INDEX}
    for model in found.models:
        described = opened(tmp_path / "out" / model.path).get_spec().description
        (use,) = model.used_by
        assert tuple(each.name for each in described.input) == use.inputs
        assert tuple(each.name for each in described.output) == use.outputs


def test_the_command_line_tells_what_it_wrote(
    portable_pte: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    done = in_process(capfd, monkeypatch, "extract", portable_pte, "-o", out)
    assert done.code == 0 and f"{out}/model-1.mlpackage" in done.out
    assert "forward, partition 1: main" in done.out
    words = ("extract", portable_pte, "-o", out, "--overwrite", "--format", "json")
    told = json.loads(in_process(capfd, monkeypatch, *words).out)
    assert told == {"folder": str(out), **json.loads((out / INDEX).read_text())}
    assert told["models"][1]["used_by"][0]["partition"] == 1


# What is refused


def test_a_program_of_another_backend_has_none(xnnpack_pte: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no Core ML model to extract.*XnnpackBackend"):
        extract(xnnpack_pte, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_that_was_there_is_lost(portable_pte: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    for overwrite, told in ((False, "exists already"), (True, "holds 'mine', which no extraction")):
        with pytest.raises(OutputError, match=told):
            extract(portable_pte, out, overwrite=overwrite)
    assert [entry.name for entry in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    (out / "model-7.mlpackage").mkdir()  # no index lists it
    with pytest.raises(OutputError, match="model-7"):
        extract(portable_pte, out, overwrite=True)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OutputError, match="Not a directory"):
        extract(portable_pte, file, overwrite=True)


# Stands for half of a character, which no index is written with.
UNTOLD = b"QQQQQQ"
Edit = Callable[[dict[str, bytes]], None]


def edited(sample: Path, path: Path, edit: Edit) -> Path:
    """Write `sample` to `path` with other files in its delegate."""
    program = deserialize_pte_binary(sample.read_bytes())
    (held,) = program.program.backend_delegate_data
    files = {name: bytes(content) for name, content in unpack(memoryview(held.data)).items()}
    edit(files)
    held.data = pack(files).replace(UNTOLD, rb"\ud800"[::-1])
    path.write_bytes(bytes(serialize_pte_binary(program)))
    return path


def with_manifest(**entries: Any) -> Edit:
    def edit(files: dict[str, bytes]) -> None:
        manifest = json.loads(files[MANIFEST])
        manifest["itemInfoEntries"] |= entries
        files[MANIFEST] = json.dumps(manifest).encode()

    return edit


def with_file(name: str) -> Edit:
    return lambda files: files.update({f"model.mlpackage/{name}": b""})


def many(files: dict[str, bytes]) -> None:
    files |= {f"model.mlpackage/Data/{number}": b"" for number in range(300)}


HOSTILE: dict[str, tuple[Edit, str]] = {
    "a path that leads out": (with_manifest(x={"path": "../../secret"}), "names '../../secret'"),
    "an absolute path": (with_manifest(x={"path": "/etc/passwd"}), "names '/etc/passwd'"),
    "the package itself": (with_manifest(x={"path": "."}), "names '.'"),
    "a path without end": (with_manifest(x={"path": "a/" * 400_000}), "no exporter gives"),
    "no path": (with_manifest(x={"path": 7}), "names ''"),
    "no entry": (with_manifest(x=[1]), "names ''"),
    "a folder in a file": (
        with_manifest(x={"path": "com.apple.CoreML/model.mlmodel/x"}),
        "names 'com.apple.CoreML/model.mlmodel/x'",
    ),
    "a terminal's command": (with_file("Data/a\x1b[2J"), "no exporter gives"),
    "a name that is no text": (with_file(f"Data/{UNTOLD.decode()}"), "no exporter gives"),
    "a name without end": (with_file("Data/" + 300 * "x"), "no exporter gives"),
    "a path of long letters": (with_file("Data/" + "/".join(6 * [100 * "é"])), "no exporter gives"),
    "files without end": (many, "model of 30. files"),
    "no model": (lambda files: files.clear(), "no readable metadata"),
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_models_are_refused(what: str, sample_pte: Path, tmp_path: Path) -> None:
    edit, told = HOSTILE[what]
    place = tmp_path / "inside"
    place.mkdir()
    path = edited(sample_pte, tmp_path / "hostile.pte", edit)
    with pytest.raises(ArtifactError, match=told) as caught:
        extract(path, place / "out")
    assert str(caught.value).isprintable()
    assert not list(place.iterdir())


def test_a_file_that_fails_half_way_leaves_nothing(
    portable_pte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = tmp_path / "out"
    extract(portable_pte, before)
    held = files_of(before)
    monkeypatch.setattr("llm_coreml.inspect.extraction.write_json", full)
    for place in (tmp_path / "deep" / "new", before):
        with pytest.raises(OutputError, match="is full"):
            extract(portable_pte, place, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert files_of(before) == held


def test_a_compiled_model_is_written_as_it_is(sample_pte: Path, tmp_path: Path) -> None:
    def compiled(files: dict[str, bytes]) -> None:
        for name in [name for name in files if name.startswith("model.mlpackage/")]:
            del files[name]
        files["model.mlmodelc/coremldata.bin"] = b"compiled"

    path = edited(sample_pte, tmp_path / "compiled.pte", compiled)
    (model,) = extract(path, tmp_path / "out").models
    assert model.path == "model-0.mlmodelc"
    assert files_of(tmp_path / "out" / model.path) == {"coremldata.bin": b"compiled"}
    (use,) = model.used_by
    assert use == ModelUse("forward", 0, "", use.inputs, use.outputs)
    extract(path, tmp_path / "out", overwrite=True)
    shutil.rmtree(tmp_path / "out")
