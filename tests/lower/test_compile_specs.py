"""What ExecuTorch's Core ML backend is told: passes, further specs, and compiled models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_coreml
from exported import in_process
from llm_coreml.artifact import pte
from llm_coreml.artifact.packages import Packages
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import ArtifactError, ConfigError, UnsupportedError
from llm_coreml.inspect.contents import contents
from llm_coreml.lower import compiled
from llm_coreml.lower.compiled import compile_program
from llm_coreml.lower.mil_passes import pass_names
from programs import shared_pte, two_segments_pte
from tiny import llama, small_spec

__all__ = ["shared_pte", "two_segments_pte"]
JOIN = "llm_coreml::join_slices"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"passes": ("-a", "b")}, "names passes to run and passes to leave out"),
        ({"passes": ()}, "--passes holds no name"),
        ({"passes": ("-",)}, "--passes holds no name"),
        ({"passes": ("--a::b",)}, "holds '--a::b'; one hyphen leaves a pass out: '-a::b'"),
        ({"passes": ("a::b", "c", "a::b")}, "names 'a::b' twice"),
        ({"compile_specs": ("compute_units=all",)}, "compute_units is decided by --target"),
        ({"compile_specs": ("min_deployment_target=8",)}, "decided by --minimum-os"),
        ({"compile_specs": ("pass_pipeline=[]",)}, "decided by --passes"),
        ({"compile_specs": ("op_linear_quantizer_config={}",)}, "--scheme int8-channel"),
        ({"compile_specs": ("a",)}, "give KEY=VALUE"),
        ({"compile_specs": ("a=1", "a=2")}, "each key once"),
        ({"compile_specs": ("=1",)}, "give KEY=VALUE"),
        ({"backend": "xnnpack", "passes": ("-a",)}, "--passes is about Core ML"),
        ({"backend": "xnnpack", "model_type": "compiled_model"}, "--model-type is about Core ML"),
        ({"model_type": "mlmodelc"}, "must be model or compiled_model"),
    ],
    ids=str,
)
def test_settings_that_contradict(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ExportConfig(**settings)


def test_settings_are_the_same_from_flags_recipes_and_python() -> None:
    config = ExportConfig(passes=("-a::b", "-c::d"), compile_specs=("key=value=x",))
    assert config.flags() == ["--passes", "-a::b,-c::d", "--compile-specs", "key=value=x"]
    recipe = {"target": {"passes": ["-a::b", "-c::d"], "compile_specs": ["key=value=x"]}}
    assert ExportConfig.from_json(recipe) == config
    assert ExportConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    job = resolve(config, small_spec())
    assert job.passes == config.passes and job.compile_specs == config.compile_specs


def test_passes_are_replaced_or_left_out() -> None:
    usual = pass_names()
    assert usual[0] == JOIN and len(usual) > 50
    assert pass_names((f"-{JOIN}",)) == usual[1:]
    assert pass_names(usual[3:6]) == usual[3:6]
    with pytest.raises(ConfigError, match=r"no pass 'common::nope'"):
        pass_names(("common::nope",))
    # Coremltools has it, and it is not among the usual ones.
    with pytest.raises(ConfigError, match=r"usual passes do not hold .*const_deduplication'"):
        pass_names(("-common::const_deduplication",))


# Compiled models


def stand_in(package: Path) -> Path:
    """Make what looks like a compiled model, of the package that it is given."""
    made = package.with_name("made.mlmodelc")
    made.mkdir()
    (made / "coremldata.bin").write_bytes((package / "Manifest.json").read_bytes())
    return made


@pytest.mark.parametrize(("name", "models"), [("two_segments_pte", 2), ("shared_pte", 1)])
def test_every_model_of_a_program_is_compiled_once(
    name: str, models: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(name)
    path = tmp_path / "compiled.pte"
    path.write_bytes(source.read_bytes())
    seen: list[Path] = []

    def compiler(package: Path) -> Path:
        seen.append(package)
        return stand_in(package)

    compile_program(path, compiler)
    assert len(seen) == models and not any(package.exists() for package in seen)
    before, after = pte.read(source), pte.read(path)
    old, packages = Packages(before), Packages(after)
    assert before.methods.keys() == after.methods.keys()
    for method in before.methods.values():
        made = after.methods[method.name].delegates
        for was, delegate in zip(method.delegates, made, strict=True):
            assert delegate.compile_specs["model_type"] == b"compiled_model"
            kept = {key for key in was.compile_specs if key != "model_type"}
            assert all(delegate.compile_specs[key] == was.compile_specs[key] for key in kept)
            used, use = old.find(was), packages.find(delegate)
            assert use.folder.compiled and use.function == used.function
            assert (use.inputs, use.outputs) == (used.inputs, used.outputs)
            manifest = used.folder.files["model.mlpackage/Manifest.json"]
            assert use.folder.files["model.mlmodelc/coremldata.bin"] == manifest
            with pytest.raises(ArtifactError, match="compiled for a device"):
                packages.open(delegate)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "check_compiler", lambda: None)
    monkeypatch.setattr(compiled, "core_ml_compiler", stand_in)
    yield


def settings(**changes: Any) -> ExportConfig:
    return ExportConfig(context=32, seq_lengths=(1, 8), scheme="int8-channel", **changes)


@pytest.mark.usefixtures("mac")
def test_an_export_with_all_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        passes=(f"-{JOIN}",), compile_specs=("note=mine",), model_type="compiled_model"
    )
    bundle = llm_coreml.export(llama(), output=tmp_path / "out", config=config, cache=False)
    target = bundle.manifest.config["target"]
    assert target["model_type"] == "compiled_model" and target["compile_specs"] == ["note=mine"]
    # What was verified is the model before it was compiled.
    assert bundle.manifest.verification.mean_kl < 1e-3
    (delegate,) = pte.read_delegates(bundle.program)
    assert delegate.compile_specs["note"] == b"mine"
    assert JOIN not in json.loads(delegate.compile_specs["pass_pipeline"])
    (shown,) = contents(bundle.folder).methods["forward"]
    assert shown.model is None
    (model,) = llm_coreml.extract(bundle.folder, tmp_path / "models").models
    assert model.path == "model-0.mlmodelc"
    done = in_process(capfd, monkeypatch, "run", bundle.folder)
    assert done.code == ArtifactError.exit_code and "export it uncompiled" in done.err


def test_a_machine_without_a_compiler_is_told_so_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"compiled_model needs macOS.*leave it out"):
        llm_coreml.export(
            llama(), output=tmp_path / "out", config=settings(model_type="compiled_model")
        )
    with pytest.raises(ConfigError, match="no pass 'nope'"):
        llm_coreml.export(llama(), output=tmp_path / "out", config=settings(passes=("nope",)))
    assert not list(tmp_path.iterdir())
