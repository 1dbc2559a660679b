"""Which system has which operation: our table against coremltools, and what models ask for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from llm_coreml.artifact import opsets, pte
from llm_coreml.artifact.compatibility import Compatibility, compatibility
from llm_coreml.artifact.mil import Model
from llm_coreml.artifact.opsets import oldest, operations
from llm_coreml.artifact.packages import Packages, model_of_folder
from llm_coreml.systems import BY_NAME, MINIMUM_OS, SYSTEMS, of_specification, older

ROOT = Path(__file__).parents[2]
DEFINED = {name: versions for name, versions in SSAOpRegistry.core_ops.items()}
TARGETS = [ct.target.iOS15, ct.target.iOS16, ct.target.iOS17, ct.target.iOS18]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("opsets_script", ROOT / "scripts" / "opsets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The table and the page


def test_the_table_is_the_registry_of_coremltools(script: Any) -> None:
    held = json.loads(Path(opsets.__file__).with_name("opsets.json").read_text())
    assert held == script.table(), "python scripts/opsets.py table"
    # Not by the script alone: a system has what the registry gives its target.
    for name, versions in DEFINED.items():
        for target in TARGETS:
            begun = [system for system in held[name] if system <= target.name]
            assert bool(begun) == (target in versions), (name, target)
            if begun:
                known = versions[target].input_spec.input_types
                assert operations()[name][max(begun)].keys() == known.keys(), (name, target)
    assert operations().keys() - {"write_state"} == DEFINED.keys()


def test_the_page_says_what_the_table_does(script: Any) -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert page.rstrip("\n") == "\n".join(script.page()), "python scripts/opsets.py page"
    assert "| `scaled_dot_product_attention` |  |  |  | x | x |" in page
    assert "| `gather` | x | + | + | x | x |" in page


def test_systems_are_those_of_coremltools() -> None:
    for system in SYSTEMS:
        assert ct.target[system.name].value == system.specification
        assert ct._OPSET[system.specification] == system.opset
        for name in system.others:
            # It has no word for visionOS.
            assert name.startswith("visionOS") or ct.target[name].value == system.specification
    known = {name for name in ct.target.__members__ if ct.target[name] >= ct.target.iOS16}
    assert known == {name for name in MINIMUM_OS if not name.startswith("visionOS")}
    assert of_specification(5) == SYSTEMS[0] and of_specification(11) is None
    assert older("iOS18", "iOS26") and not older("iOS18", "iOS18") and BY_NAME["visionOS2"].others


@pytest.mark.parametrize(
    ("operation", "given", "expected"),
    [
        ("gather", {"x": "fp16", "indices": "int32", "axis": "int32"}, "iOS15"),
        ("gather", {"x": "fp16", "indices": "int16", "axis": "int32"}, "iOS16"),
        ("gather", {"x": "int8", "indices": "int32", "axis": "int32"}, "iOS17"),
        ("gather", {"x": "fp16", "indices": "int32", "validate_indices": "bool"}, "iOS17"),
        ("topk", {"x": "fp16", "k": "int32", "sort": "bool"}, "iOS16"),
        ("layer_norm", {"x": "fp16", "gamma": "fp16", "axes": "int32"}, "iOS15"),
        ("layer_norm", {"x": "fp16", "gamma": "fp32", "axes": "int32"}, "iOS17"),
        ("constexpr_lut_to_dense", {"indices": "uint8", "lut": "fp16", "shape": "uint32"}, "iOS16"),
        ("constexpr_lut_to_dense", {"indices": "uint4", "lut": "fp16"}, "iOS18"),
        ("write_state", {"input": "", "data": "fp16"}, "iOS18"),
        ("concat", {"values": "", "axis": "int32", "interleave": "bool"}, "iOS15"),
        ("invented", {}, None),
    ],
)
def test_a_version_is_told_by_what_it_takes(
    operation: str, given: dict[str, str], expected: str | None
) -> None:
    assert oldest(operation, given) == expected


# Models

Load = Callable[..., Any]
X = {"x": mb.placeholder(shape=(2, 4), dtype=types.fp32)}


@pytest.fixture
def asked(harness: Any, tmp_path: Path) -> Callable[..., Compatibility]:
    """Build a program of one operation for a target, and say what it asks for."""

    def build(body: Any, target: Any, inputs: Any = X) -> Compatibility:
        path = tmp_path / "model.mlpackage"
        harness.save(harness.build_program(inputs, body, target), path, target)
        return compatibility(model_of_folder(path))

    return build


@pytest.mark.parametrize("target", TARGETS, ids=lambda each: each.name)
def test_a_program_declares_its_target(asked: Any, target: Any) -> None:
    found = asked(lambda v: [mb.relu(x=v["x"])], target)
    assert (found.declared, found.needed, found.needs) == (target.name, "iOS15", ())
    assert found.specification == target.value and not found.mixed


def test_what_needs_a_system_is_named(asked: Any) -> None:
    codes = np.zeros((4, 4), np.int8)

    def body(v: Any) -> list[Any]:
        weight = mb.constexpr_affine_dequantize(
            quantized_data=codes, zero_point=np.int8(0), scale=np.float32(1), axis=0, name="weight"
        )
        return [mb.topk(x=mb.matmul(x=v["x"], y=weight), k=2, sort=False, name="best")[0]]

    found = asked(body, ct.target.iOS16)
    assert found.declared == "iOS16" and found.needed == "iOS16"
    assert {need.what: need.system for need in found.needs} == {
        "constexpr_affine_dequantize": "iOS16",
        "topk": "iOS16",
    }
    assert found.newer_than("macOS13") == () and len(found.newer_than("iOS15")) == 2


def parts(path: Path) -> list[Model]:
    container = pte.read(path)
    packages = Packages(container)
    methods = container.methods.values()
    return [packages.open(each).package.model for method in methods for each in method.delegates]


def test_nothing_of_coremltools_needs_more_than_it_declares(
    sample_pte: Path, portable_pte: Path, shared_pte: Path
) -> None:
    for path in (sample_pte, portable_pte, shared_pte):
        for model in parts(path):
            found = compatibility(model)
            assert found.declared == "iOS18" and not found.newer_than("iOS18") and not found.mixed
    (stateful,) = parts(sample_pte)
    assert {"a state", "read_state", "write_state"} <= {
        need.what for need in compatibility(stateful).needs if need.system == "iOS18"
    }
    several = compatibility(parts(shared_pte)[0])
    assert several.needed == "iOS18" and several.needs[0].what == "several functions"
    assert {compatibility(model).needed for model in parts(portable_pte)} == {"iOS16"}


def test_what_is_newer_than_all_that_is_known(sample_pte: Path) -> None:
    (model,) = parts(sample_pte)
    assert compatibility(replace(model, specification_version=99)).declared == ""
    function = model.functions["main"]
    newer = replace(model, functions={"main": replace(function, opset="CoreML99")})
    assert compatibility(newer).declared == ""
    operations = (*function.operations, replace(function.operations[-1], type="thinks"))
    odd = replace(model, functions={"main": replace(function, operations=operations)})
    found = compatibility(odd)
    assert found.needed == "" and found.needs[0].what == "thinks"
    assert "thinks" in str(found.newer_than("iOS26")[0])


def test_operands_of_two_types_are_found(harness: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    inputs = {name: mb.placeholder(shape=(2, 4), dtype=types.fp32) for name in "xy"}
    program = harness.build_program(
        inputs, lambda v: [mb.add(x=v["x"], y=v["y"], name="sum")], ct.target.iOS16
    )
    harness.save(program, path, ct.target.iOS16)
    model = model_of_folder(path)
    function = model.functions["main"]
    half = replace(function.inputs[1], type=replace(function.inputs[1].type, dtype="fp16"))
    wrong = replace(function, inputs=(function.inputs[0], half))
    (mixed,) = compatibility(replace(model, functions={"main": wrong})).mixed
    assert str(mixed) == "add ('sum') of x in fp32 and y in fp16"
