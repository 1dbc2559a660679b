"""The weights of a model in training as files, against what an export of the model itself reads."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torchao.quantization import quantize_

import llm_coreml
from exported import make_tokenizer
from llm_coreml.checkpoint import open_checkpoint
from llm_coreml.errors import CheckpointError, OutputError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.training import handover
from llm_coreml.training.handover import hand_over
from tiny import llama, randomize
from warned import OF_PEFT

pytestmark = OF_PEFT

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}


def adapted(**options: Any) -> Any:
    made = peft.get_peft_model(
        llama(tie_word_embeddings=True), peft.LoraConfig(**{**LORA, **options})
    )
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return made


def in_training_with_rounding() -> Any:
    qat = llm_coreml.qat_config("int4-group", group_size=16)
    live = llama()
    quantize_(live, qat.prepare, qat.filter)
    return live


KINDS: dict[str, Callable[[], Any]] = {
    "tied": lambda: llama(tie_word_embeddings=True),
    "untied": llama,
    "bf16": lambda: llama().to(torch.bfloat16),
    "compiled": lambda: torch.compile(llama()),
    "LoRA": adapted,
    "LoRA over bf16": lambda: adapted(use_dora=True).to(torch.bfloat16),
    "LoRA of a tied table": lambda: adapted(target_modules=["embed_tokens"]),
    "whole modules": lambda: adapted(modules_to_save=["norm", "lm_head"]),
    "rounded": in_training_with_rounding,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_the_model(kind: str, tmp_path: Path) -> None:
    live = KINDS[kind]().train()
    folder = hand_over(live, None, tmp_path, 7)
    assert folder.name == "LlamaForCausalLM-step-7"
    found, wanted = open_model(folder), open_model(live)
    assert (found.spec, found.sha256()) == (wanted.spec, wanted.sha256())
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_several_files_and_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_SHARD", 50_000)
    live = llama(vocab_size=300)
    folder = hand_over(live, make_tokenizer(), tmp_path, 1)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert open_model(folder).sha256() == open_model(live).sha256()
    assert {"tokenizer.json", "generation_config.json"} <= set(os.listdir(folder))


def test_one_file_at_a_time_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the CPU and whole is not copied at all."""
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(handover, "save_file", lambda tensors, *_: seen.append(tensors))
    live = llama()
    hand_over(live, None, tmp_path, 1)
    own = {value.data_ptr() for value in live.state_dict().values()}
    assert all(value.data_ptr() in own for value in seen[0].values())


def refused(*_: Any, **__: Any) -> Any:
    raise UnsupportedError("'weight' is sharded over 2 processes.")


@pytest.mark.parametrize("alone", [False, True])
def test_what_the_trainer_saved_stands_in_for_a_sharded_model(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = adapted() if alone else llama(tie_word_embeddings=True)
    live.save_pretrained(tmp_path / "saved")
    if alone:
        base = llama(tie_word_embeddings=True)
        base.save_pretrained(tmp_path / "base")
        path = tmp_path / "saved" / "adapter_config.json"
        named = path.read_text().replace(
            '"base_model_name_or_path": null', f'"base_model_name_or_path": "{tmp_path / "base"}"'
        )
        path.write_text(named)
    wanted = open_checkpoint(live)
    monkeypatch.setattr(handover, "open_live", refused)
    (tmp_path / "at").mkdir()
    folder = hand_over(live, None, tmp_path / "at", 3, tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():  # as the trainer's rotation does
        path.unlink()
    found = open_checkpoint(folder)
    for name in wanted.names():  # PEFT merges in another order than is done from files
        assert torch.allclose(found.stored(name), wanted.stored(name), atol=1e-6), name
    with pytest.raises(UnsupportedError, match="sharded over 2 processes"):
        hand_over(live, None, tmp_path / "at", 4, tmp_path / "nothing")


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="meta device"):
        hand_over(copy.deepcopy(llama()).to("meta"), None, tmp_path, 1)
    with pytest.raises(OutputError, match="cannot be written"):
        hand_over(llama(), None, tmp_path / "nowhere", 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handover, "save_file", full)
    with pytest.raises(OutputError, match=r"disk that holds '.*' is full"):
        hand_over(randomize(llama(), 1), None, tmp_path, 1)


def test_nothing_of_the_model_is_changed(tmp_path: Path) -> None:
    live = adapted(lora_dropout=0.1).train()
    before = {name: value.clone() for name, value in live.state_dict().items()}
    hand_over(live, None, tmp_path, 1)
    assert all(torch.equal(before[name], value) for name, value in live.state_dict().items())
    assert live.training and open_checkpoint(live).names()
