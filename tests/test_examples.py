"""The examples run as they are: scripts in this process, the notebook in a kernel of its own."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import cases
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.training import exporter
from llm_coreml.training.export_process import Bounds, Order, fulfil
from warned import OF_PEFT

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = {
    "plain_loop": ("int4 group 32", "top-1 agreement"),
    "peft_lora": ("codebook 4 bit", "trainable params: 16,384"),
    "qat": ("int4 group 32", "with weights of 4 bits"),
    "trl_sft": ("int4 group 32", "eval_coreml_perplexity"),
}
pytestmark = [
    *OF_PEFT,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"small"}
    assert scripts == set(SCRIPTS)
    assert [path.name for path in FOLDER.glob("*.ipynb")] == ["live_export.ipynb"]


class InThisProcess:
    """An export where the training is, which has loaded already what another process would."""

    ended = True

    def __init__(self, order: Order, scratch: Path, bounds: Bounds) -> None:
        self._failure = fulfil(json.loads(json.dumps(order.to_json())), bounds.memory)

    def wait(self) -> None:
        pass

    def failure(self) -> str | None:
        return self._failure


@pytest.mark.parametrize("name", cases(SCRIPTS, set(SCRIPTS) - {"plain_loop"}))
def test_a_script(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "out"])
    monkeypatch.setattr(exporter, "ExportProcess", InThisProcess)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    out = capfd.readouterr().out
    weights, told = SCRIPTS[name]
    assert told in out
    bundle = open_bundle(tmp_path / "out" / ("exports/best" if name == "trl_sft" else ""))
    assert bundle.manifest.quantization.linear.label.startswith(weights)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.exhaustive
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for name in ("small.py", "live_export.ipynb"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    notebook = nbformat.read(tmp_path / "live_export.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "is kept without outputs"
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert shown["train"][-1].text.startswith("loss ")
    # The bar, drawn by widgets, is gone when it is full; the table stays.
    [table] = html_of(shown["export"])
    assert "int4 group 32" in table and "model.pte" in table and str(tmp_path) not in table
    [table] = html_of(shown["measure"])
    assert "artifact" in table and "top-1 agreement" in table
    assert not any(each.output_type == "stream" for each in shown["export"]), "only the bar speaks"


def html_of(outputs: list[Any]) -> list[str]:
    found = [each.data.get("text/html", "") for each in outputs if "data" in each]
    return [text for text in found if "<table" in text]
