"""Every example of `docs/torchao.md`, run, and what its table says of configurations."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.prototype.quantization.codebook_coreml import CodebookWeightOnlyConfig
from torchao.quantization import IntxWeightOnlyConfig
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from artifacts import program
from cases import cases
from exported import in_process, make_model, manifest_of, save_model
from llm_coreml.config import ExportConfig
from llm_coreml.quantize.formats.scheme_json import scheme_from_json
from llm_coreml.quantize.formats.schemes import IntChannel
from llm_coreml.recipes import load_recipe

PAGE = Path(__file__).parents[3] / "docs" / "torchao.md"
NAMES: dict[str, Any] = {
    "torch": torch,
    "IntxWeightOnlyConfig": IntxWeightOnlyConfig,
    "CodebookWeightOnlyConfig": CodebookWeightOnlyConfig,
    "PerAxis": PerAxis,
    "PerGroup": PerGroup,
    "MappingType": MappingType,
}


def examples(beginning: str) -> list[str]:
    """Return the examples that begin with a word, without their indentation."""
    lines = PAGE.read_text().splitlines()
    blocks = [
        "\n".join(line[4:] for line in part).strip()
        for indented, part in groupby(lines, lambda line: not line or line.startswith("    "))
        if indented
    ]
    return [block for block in blocks if block.startswith(beginning)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_COREML_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "my-finetune", make_model(vocab_size=304))
    return tmp_path


def labels(bundle: Path) -> dict[str, str]:
    """Return the formats of a verified bundle's groups."""
    manifest = manifest_of(bundle)
    assert manifest["verification"]["mean_kl"] < 1e-3
    stored = manifest["quantization"]
    return {name: stored[name]["label"] for name in ("linear", "embedding", "lm_head")}


MADE = {
    "grouped": ("int4 group 32", "int8 per channel", "int8 per channel"),
    "tables": 3 * ("codebook 3 bit, 16 rows per table",),
}


@pytest.mark.parametrize("name", cases(MADE, {"tables"}))
def test_configurations_make_exports(name: str, folder: Path) -> None:
    (example,) = [each for each in examples("import torch") if f'"out/{name}"' in each]
    exec(compile(example, PAGE.name, "exec"), {})
    assert tuple(labels(folder / "out" / name).values()) == MADE[name]


@pytest.mark.parametrize("name", cases(["weights", "static"], {"weights"}))
def test_pt2e_makes_exports(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (lines,) = examples("llm-coreml export ./my-finetune -o out/weights")
    (command,) = [line for line in lines.splitlines() if f"--pt2e {name}" in line]
    done = in_process(capfd, monkeypatch, *shlex.split(command)[1:])
    assert done.code == 0, done.err
    out = folder / "out" / name
    assert set(labels(out).values()) == {"int8 per channel"}
    manifest = manifest_of(out)
    assert manifest["verification"]["conversion"] and manifest["config"]["weights"]["pt2e"] == name
    used = manifest["quantization"]["calibration"]
    assert (used and used["method"]) == ("ranges" if name == "static" else None)
    kinds = Counter(op.type for op in program(out / "model.pte").operations)
    # Seven linear layers, of which the first three and the next two read the same.
    rounded = 0 if name == "weights" else kinds["quantize"]
    assert kinds["quantize"] == kinds["dequantize"] == rounded
    assert (rounded >= 11) is (name == "static")


def test_patterns_make_the_same_export_from_flags_and_from_a_recipe(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = examples("llm-coreml export ./my-finetune -o out/flags")
    done = in_process(capfd, monkeypatch, *shlex.split(command)[1:])
    assert done.code == 0, done.err
    assert labels(folder / "out/flags") == {
        "linear": "int8 per channel",
        "embedding": "int8 per channel",
        "lm_head": "codebook 6 bit, 16 rows per table",
    }
    manifest = manifest_of(folder / "out/flags")
    matrix = manifest["quantization"]["plan"]["matrices"]["layers.0.mlp.up_proj"]
    assert scheme_from_json(matrix["scheme"]) == IntChannel(8)
    (weights,) = examples("weights:")
    (folder / "mine.yaml").write_text(f"model: ./my-finetune\n{weights}\n")
    config = load_recipe("mine.yaml").config
    assert config == ExportConfig.from_json(manifest["config"])
    assert manifest["rebuild"][-2:] == ["--scheme", config.scheme]


def test_the_table_says_what_configurations_are() -> None:
    rows = re.findall(r"^\| `(\w+Config\(.*\))` \| `(.*)` \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 6
    for code, text in rows:
        assert ExportConfig(scheme=eval(code, NAMES)).scheme == text, code
