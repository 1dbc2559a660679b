"""A folder with an adapter alone through the command line: exported, or refused in a sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exported import SHAPES, files_of, in_process, make_model, manifest_of
from llm_coreml.checkpoint import open_checkpoint

Q = "base_model.model.model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def lora(checkpoint: Path, tmp_path: Path) -> Path:
    """What PEFT's `save_pretrained` writes of a LoRA over the tiny model, rank 4."""
    folder = tmp_path / "lora"
    folder.mkdir()
    write(folder, {}, base_model_name_or_path=str(checkpoint))
    return folder


def write(folder: Path, tensors: Tensors, **settings: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    width = make_model().config.hidden_size
    held = {
        f"{Q}.lora_A.weight": torch.randn(4, width, generator=draw),
        f"{Q}.lora_B.weight": torch.randn(width, 4, generator=draw) * 0.1,
    }
    save_file({**held, **tensors}, folder / "adapter_model.safetensors", {"format": "pt"})
    path = folder / "adapter_config.json"
    before = json.loads(path.read_text()) if path.is_file() else {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }  # fmt: skip
    path.write_text(json.dumps({**before, **settings}))


def test_the_export_is_that_of_the_merged_model(
    lora: Path,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = in_process(capfd, monkeypatch, "export", "lora", "-o", "out", *SHAPES, "--bits", "4")
    assert done.code == 0, done.err
    assert f"read from the folder '{checkpoint.name}'" in done.err
    merged, base = open_checkpoint(lora), open_checkpoint(checkpoint)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.stored(name), base.stored(name))
    manifest = manifest_of(tmp_path / "out")
    assert manifest["source"]["name"] == "lora"
    assert manifest["source"]["sha256"] == merged.sha256()
    assert "tokenizer.json" in os.listdir(tmp_path / "out")


ELSEWHERE = {
    "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32),
    "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.ones(32, 4),
}


@pytest.mark.parametrize(
    ("spoil", "code", "told"),
    [
        (lambda lora: write(lora, {f"{Q}.lora_A.weight": torch.ones(4, 48)}), 4, "does not fit"),
        (lambda lora: write(lora, {f"{Q}.lora_A.weight": torch.ones(3, 32)}), 4, "by [3, 32]"),
        (lambda lora: write(lora, {}, r=5), 4, "has rank 4, and adapter_config.json gives 5"),
        (
            lambda lora: write(lora, ELSEWHERE),
            4,
            "do not hold",
        ),
        (lambda lora: write(lora, {f"{Q}.lora_C.weight": torch.ones(4)}), 5, "lora_C"),
        (lambda lora: write(lora, {}, base_model_name_or_path="/gone"), 4, "no folder here"),
        (lambda lora: write(lora, {}, base_model_name_or_path=None), 4, "names no base model"),
        (lambda lora: (lora / "adapter_model.safetensors").unlink(), 4, "adapter_model"),
    ],
    ids=["other base", "other rank", "rank of settings", "no such layer", "unknown tensor",
         "base is gone", "no base", "no weights"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence(
    spoil: Callable[[Path], object],
    code: int,
    told: str,
    lora: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(lora)
    monkeypatch.chdir(tmp_path)
    before = files_of(tmp_path)
    done = in_process(capfd, monkeypatch, "export", "lora", "-o", "out", *SHAPES)
    *_, line = done.err.splitlines()
    assert done.code == code and line.startswith("Error: ") and told in line, done.err
    assert done.out == "" and "Traceback" not in done.err
    assert files_of(tmp_path) == before
