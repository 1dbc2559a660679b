"""Opening a model: what its files say wins over what config.json claims, and early over late."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_coreml import model as model_module
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import DecoderSpec
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.quantized import build_original
from llm_coreml.recipes import bundled_model
from llm_coreml.runtime.eager import EagerRunner
from tiny import expected_logits, llama, save, tokens_for

CONTEXT = 64


def with_head(folder: Path, factor: float) -> Path:
    """Write a head beside the table of a tied checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_head_trained_apart_is_read_though_the_config_ties_it(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = with_head(save(llama(tie_word_embeddings=True), tmp_path / "m"), -2.0)
    model = open_model(folder)
    assert not model.spec.tie_word_embeddings
    tokens = tokens_for(model.spec.vocab_size, 20)
    logits = EagerRunner(build_original(model, CONTEXT), "eager").logits(tokens)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    untied = LlamaForCausalLM.from_pretrained(folder).eval()
    assert (logits - expected_logits(untied, tokens)).abs().max() < 1e-4


def test_an_equal_head_stays_tied_and_leaves_the_hash_alone(tmp_path: Path) -> None:
    plain = open_model(save(llama(tie_word_embeddings=True), tmp_path / "plain"))
    doubled = save(llama(tie_word_embeddings=True), tmp_path / "doubled")
    doubled = open_model(with_head(doubled, 1.0))
    assert doubled.spec == plain.spec and doubled.spec.tie_word_embeddings
    assert doubled.sha256() == plain.sha256()


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_family_that_forgets_a_parameter_is_refused(
    name: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(llama(tie_word_embeddings=tied))
    stored = model.family.stored
    forgetful = replace(
        model.family,
        stored=lambda spec: {each: made for each, made in stored(spec).items() if each != name},
    )
    monkeypatch.setattr(model_module, "find_family", lambda _: forgetful)
    with pytest.raises(ValueError, match=f"of 'llama' does not say what .* {name} is made of"):
        open_model(llama(tie_word_embeddings=tied))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (ExportConfig(group_size=24), UnsupportedError),
        (ExportConfig(scheme="none", context=4096), ConfigError),
    ],
)
def test_settings_are_judged_before_weights_are_fetched(
    config: ExportConfig,
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save(llama(), tmp_path / "c0ffee")
    fetched: list[str] = []

    def download(repo: str, allow_patterns: list[str], **options: object) -> str:
        fetched.extend(allow_patterns)
        return str(folder)

    def accept(spec: DecoderSpec, quantized: bool) -> None:
        assert not quantized
        job = resolve(config, spec)
        make_plan(job, spec)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(error):
        open_model("org/name", accept=accept)
    assert "config.json" in fetched and "model.safetensors" not in fetched


def test_a_folder_named_like_a_recipe_wins_only_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    assert open_model("llama").source.kind == "bundled"
    assert open_model("llama").sha256() == open_model(bundled_model()).sha256()
    save(llama(), tmp_path / "llama")
    assert open_model("llama").source.kind == "folder"


def test_late_positions_start_from_zeros() -> None:
    runner = EagerRunner(build_original(open_model(llama()), CONTEXT), "eager")
    tokens = tokens_for(97, 8)
    early, late = runner.logits(tokens), runner.logits(tokens, CONTEXT - len(tokens))
    assert runner.position == CONTEXT
    assert torch.isfinite(late).all()
    # The zeros before are attended to, and take their share from the values.
    assert (early - late).abs().max() > 0.1
