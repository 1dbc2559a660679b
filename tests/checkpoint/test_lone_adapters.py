"""A folder or repository with an adapter alone, as PEFT saves it, against PEFT's own reading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch

from llm_coreml.checkpoint import open_checkpoint
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from tiny import expected_logits, llama, save, tokens_for
from warned import OF_PEFT

pytestmark = OF_PEFT

TOKENS = tokens_for(97, 24)


def adapter(folder: Path, base: Path, model: Any = None, **options: Any) -> Any:
    """Train an adapter over the model in `base`, save it alone, and return what was trained."""
    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], **options}
    )
    kind = type(llama())
    made = peft.get_peft_model(kind.from_pretrained(base) if model is None else model, config)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    made.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return made.eval()


def name_base(folder: Path, **values: Any) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **values}))


def logits_of(source: Any) -> torch.Tensor:
    return EagerRunner(build_original(open_model(source), 64), "eager").logits(TOKENS)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(llama(tie_word_embeddings=True), tmp_path / "base")


def test_the_base_is_read_and_the_adapter_merged(base: Path, tmp_path: Path) -> None:
    live = adapter(tmp_path / "lora", base)
    assert (logits_of(tmp_path / "lora") - expected_logits(live, TOKENS)).abs().max() < 1e-4
    opened = open_model(tmp_path / "lora")
    assert opened.source.name == str(tmp_path / "lora")
    told = " ".join(opened.notes)
    assert "read from the folder 'base'" in told and "merged into 2 matrices" in told


def test_a_table_that_grew_with_the_adapter(base: Path, tmp_path: Path) -> None:
    live = type(llama()).from_pretrained(base)
    live.resize_token_embeddings(104)
    live = adapter(tmp_path / "lora", base, live)
    assert open_model(tmp_path / "lora").spec.vocab_size == 104
    assert open_model(tmp_path / "lora").spec.tie_word_embeddings
    assert (logits_of(tmp_path / "lora") - expected_logits(live, TOKENS)).abs().max() < 1e-4


def test_the_tokenizer_beside_the_adapter_is_the_models(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "lora", base)
    (base / "tokenizer.json").write_text('{"of": "base"}')
    (base / "generation_config.json").write_text('{"eos_token_id": 3}')
    files = open_checkpoint(tmp_path / "lora").tokenizer_files
    assert files["tokenizer.json"] == base / "tokenizer.json"
    (tmp_path / "lora" / "tokenizer.json").write_text('{"of": "adapter"}')
    files = open_checkpoint(tmp_path / "lora").tokenizer_files
    assert files["tokenizer.json"] == tmp_path / "lora" / "tokenizer.json"
    assert files["generation_config.json"] == base / "generation_config.json"


def test_repositories_on_the_hub(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = adapter(tmp_path / "lora", base)
    name_base(tmp_path / "lora", base_model_name_or_path="org/base", revision="v1")
    asked: list[tuple[str, str | None]] = []

    def fetched(repo: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append((repo, revision))
        source = {"org/base": base, "me/lora": tmp_path / "lora"}[repo]
        to = tmp_path / "cache" / repo / "c0ffee"
        to.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (source / name).is_file():
                shutil.copyfile(source / name, to / name)
        return str(to)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    for source in (tmp_path / "lora", "me/lora"):
        asked.clear()
        assert (logits_of(source) - expected_logits(live, TOKENS)).abs().max() < 1e-4
        assert ("org/base", "v1") in asked and ("org/base", None) not in asked
        assert "'org/base' at c0ffee" in " ".join(open_model(source).notes)
    opened = open_model("me/lora")
    assert (opened.source.kind, opened.source.name) == ("hub", "me/lora")
    assert opened.source.revision == "c0ffee"


# Bad input


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (None, r"names no base model \(base_model_name_or_path\)"),
        ("", "names no base model"),
        ("/gone/with/the/training", "'/gone/with/the/training', which is no folder here"),
    ],
)
def test_a_base_that_is_not_there(named: Any, told: str, base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "lora", base)
    name_base(tmp_path / "lora", base_model_name_or_path=named)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(tmp_path / "lora")


def test_an_adapter_of_another_base(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "lora", base)
    other = save(llama(hidden_size=32), tmp_path / "other")
    name_base(tmp_path / "lora", base_model_name_or_path=str(other))
    with pytest.raises(CheckpointError, match=r"does not fit the weight \[.*adapter of this model"):
        open_checkpoint(tmp_path / "lora")


def test_an_adapter_of_a_model_with_more_layers(base: Path, tmp_path: Path) -> None:
    deep = save(llama(num_hidden_layers=2), tmp_path / "deep")
    adapter(tmp_path / "lora", deep)
    name_base(tmp_path / "lora", base_model_name_or_path=str(base))
    with pytest.raises(CheckpointError, match=r"changes 'model\.layers\.1\..*do not hold"):
        open_checkpoint(tmp_path / "lora")


def test_a_rank_that_settings_do_not_give(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "lora", base)
    name_base(tmp_path / "lora", r=5)
    with pytest.raises(CheckpointError, match=r"has rank 8, and adapter_config.json gives 5"):
        open_checkpoint(tmp_path / "lora")


def test_a_base_that_is_an_adapter_itself(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "lora", base)
    adapter(tmp_path / "second", base)
    name_base(tmp_path / "second", base_model_name_or_path=str(tmp_path / "lora"))
    with pytest.raises(UnsupportedError, match="holds an adapter without its base model"):
        open_checkpoint(tmp_path / "second")
