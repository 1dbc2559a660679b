"""Every example of `docs/coreml-backend.md`, run: each export is what its section says."""

from __future__ import annotations

import re
import shlex
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from cases import cases
from exported import in_process, make_model, manifest_of, save_model

PAGE = Path(__file__).parents[2] / "docs" / "coreml-backend.md"


def blocks() -> list[str]:
    """Return the examples of the page, without their indentation."""
    lines = PAGE.read_text().splitlines()
    found = groupby(lines, lambda line: not line or line.startswith("    "))
    joined = ["\n".join(line[4:] for line in part).strip() for indented, part in found if indented]
    # A command may stand above Python.
    parts = [re.split(r"\n\n+(?=import )", block, maxsplit=1) for block in joined if block]
    return [part for block in parts for part in block]


COMMANDS = [
    line for block in blocks() if block.startswith("llm-coreml") for line in block.split("\n")
]
EXPORTS = {
    line.split(" -o out/")[1].split()[0]: line
    for line in COMMANDS
    if line.startswith("llm-coreml export")
}
PYTHON = dict(
    zip(
        ("package", "reference", "executorch"),
        [block for block in blocks() if block.startswith("import")],
        strict=True,
    )
)
PRINTED = {
    "package": "[[1, 1], [1, 8], [1, 32]]",
    "reference": "torch.Size([3, 304])",
    "executorch": "torch.Size([1, 1, 304])",
}
# What a manifest says of each, by the way to it.
SHOWN: dict[str, dict[str, Any]] = {
    "skipped": {"config.program.skip_ops": ["aten.embedding.default"]},
    "ends": {
        "quantization.embedding.label": "int8 per channel",
        "quantization.lm_head.label": "fp16",
    },
    "handed": {"config.program.constants": "inputs", "quantization.linear.label": "fp16"},
    "state": {"program.form": "enumerated"},
    "inputs": {"program.states": {}},
    "specs": {"config.target.compile_specs": ["my_key=my_value"]},
    "partitions": {"program.form": "enumerated"},
    "all": {"target.name": "all"},
    "cpu": {"target.name": "cpu"},
    "gpu": {"target.name": "gpu"},
    "ane": {"target.name": "ane"},
    "old": {"target.minimum_os": "iOS16"},
    "new": {"target.minimum_os": "macOS26"},
    "fp32": {"target.compute_precision": "fp32"},
    "passes": {"config.target.passes": ["-common::fuse_gelu_exact"]},
    "rounded": {"quantization.linear.label": "int8 per channel"},
    "enumerated": {"program.seq_lengths": [1, 8, 32]},
    "two-inputs": {"program.seq_lengths": [1, 8], "program.states": {}},
    "range": {"program.form": "range"},
    "static": {"program.form": "static", "program.seq_lengths": [16]},
    "functions": {"program.form": "multifunction"},
    "pt2e-weights": {"config.weights.pt2e": "weights"},
    "pt2e-static": {"config.weights.pt2e": "static"},
    "grouped": {
        "quantization.linear.label": "int4 group 32",
        "quantization.embedding.label": "int8 per channel",
    },
    "tables": {
        "quantization.linear.label": "codebook 3 bit, 16 rows per table",
        "quantization.embedding.label": "codebook 3 bit, 16 rows per table",
    },
    "twin": {"target.backend": "xnnpack"},
}
QUICK = {"enumerated", "two-inputs"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model that the examples name."""
    folder = tmp_path_factory.mktemp("page")
    save_model(folder / "my-finetune", make_model(vocab_size=304))
    return folder


def export(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Run an example in `folder`; return the manifest."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLM_COREML_CACHE", str(folder / "cache"))
    if not (folder / "out" / name).exists():
        done = in_process(capfd, monkeypatch, *shlex.split(EXPORTS[name])[1:])
        assert done.code == 0, done.err
    return manifest_of(folder / "out" / name)


def test_each_example_is_held_against_what_it_makes() -> None:
    assert EXPORTS.keys() == SHOWN.keys()


@pytest.mark.parametrize("name", cases(list(SHOWN), set(SHOWN) - QUICK))
def test_an_export_is_what_its_section_says(
    name: str, source: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = export(name, source, capfd, monkeypatch)
    assert manifest["verification"]["mean_kl"] < 1e-3
    for way, expected in SHOWN[name].items():
        found: Any = manifest
        for key in way.split("."):
            found = found[key]
        assert found == expected, way
    if name == "partitions":
        (method,) = manifest["program"]["methods"].values()
        assert len(method["functions"]) > 1


@pytest.mark.parametrize("name", cases(list(PYTHON), {"executorch"}))
def test_python_runs_what_was_exported(
    name: str, source: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export("twin" if name == "executorch" else "enumerated", source, capfd, monkeypatch)
    if name == "package":
        (line,) = [line for line in COMMANDS if line.startswith("llm-coreml extract")]
        assert in_process(capfd, monkeypatch, *shlex.split(line)[1:]).code == 0
    exec(compile(PYTHON[name], PAGE.name, "exec"), {})
    assert capfd.readouterr().out.strip() == PRINTED[name]
