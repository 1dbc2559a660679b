"""A model_type without a family: what is said of it, and when it is read as another."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from family_table import checkpoint
from llm_coreml.config import ExportConfig
from llm_coreml.errors import CheckpointError, ConfigError, UnknownFamilyError, UnsupportedError
from llm_coreml.eval.evaluate import evaluate
from llm_coreml.families import find_family, known_model_types
from llm_coreml.families.known_types import known_names, known_of
from llm_coreml.model import open_model
from llm_coreml.pipeline import export
from llm_coreml.recipes import bundled_model, load_recipe
from tiny import BASE, llama, save

ROOT = Path(__file__).parents[2]
VOCABULARY = json.loads((bundled_model() / "config.json").read_text())["vocab_size"]
LLAMA: dict[str, Any] = {**BASE, "model_type": "llama"}


def refusal(**changes: Any) -> str:
    with pytest.raises(UnknownFamilyError) as caught:
        find_family({**LLAMA, **changes})
    text = str(caught.value)
    assert text.isprintable() and len(text) < 2000
    assert ", ".join(known_model_types()) in text
    assert text.endswith("CONTRIBUTING.md tells under 'A model family' how one is added.")
    return text


@pytest.mark.parametrize(
    ("model_type", "fields", "told"),
    [
        ("mixtral", {"num_local_experts": 8}, r"mixture of experts, which is planned. .*ts = 8\)"),
        ("x", {"num_key_value_heads": 2}, "nearest to 'llama': a dense decoder, 4 heads on 2 of"),
        ("x", {"sliding_window": 4096}, "nearest to 'mistral': .* sliding window of 4096"),
        ("x", {"kv_lora_rank": 512}, "decoder with latent attention"),
        ("falcon_h1", {"mamba_d_state": 64}, "layers of state in the place of attention, which is"),
        ("git", {"vision_config": {"a": 1}}, "several modalities"),
        ("git", {"text_config": LLAMA}, "several modalities around a dense decoder, 4 heads"),
        ("t5", {"is_encoder_decoder": True}, "encoder with a decoder"),
        ("bert", {"type_vocab_size": 2}, "an encoder that can be run as a decoder, which is not"),
        ("x", {"n_positions": 768}, "learned positions"),
        ("x", {"final_logit_softcapping": 30.0}, r"capped logits \(final_logit_softcapp"),
        ("x", {"hidden_act": "gelu\x1b[31m" * 99}, r"activation of gelu\\x1b\[31m"),
        ("x", {"layer_types": ["full", "sliding"]}, "change from layer to layer"),
        ("x", {"layer_types": ["full", "full"], "num_attention_heads": [4]}, "dense decoder"),
        ("x", {"hidden_size": None}, "of a kind that its fields do not tell"),
    ],
)
def test_it_is_told_by_its_shape_and_not_by_its_name(
    model_type: str, fields: dict[str, Any], told: str
) -> None:
    assert re.search(told, refusal(model_type=model_type, **fields))


def renamed(folder: Path, model_type: str = "mimo", **settings: Any) -> Path:
    """Save a Llama under another model_type."""
    save(llama(vocab_size=settings.get("vocab_size", 96), intermediate_size=96), folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "model_type": model_type, **settings}
    path.write_text(json.dumps(config))
    return folder


def test_a_renamed_llama_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    source = renamed(tmp_path / "model", auto_map={"AutoModel": "x"}, num_nextn_predict_layers=1)
    with pytest.raises(UnknownFamilyError, match=r"those of 'llama': .* give --family llama\.$"):
        open_model(source)
    with pytest.raises(CheckpointError, match=r"2 misshapen"):
        open_model(renamed(tmp_path / "other", num_attention_heads=2), family="llama")
    with pytest.raises(UnknownFamilyError, match=r"how one is added\.$"):
        open_model(renamed(tmp_path / "wrong", intermediate_size=95))
    with pytest.raises(UnknownFamilyError, match=r"Download it and give its folder"):
        open_model_from_hub(source)


def open_model_from_hub(folder: Path) -> None:
    """Open a hub id whose configuration is that of a folder."""
    import huggingface_hub

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
        open_model("org/name")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """As MiMo is published: Qwen 2 under another name, with such layers beside it."""
    checkpoint(tmp_path, "qwen2", {})
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    further = {"model.mtp_layers.0.input_proj.weight": torch.zeros(64, 128)}
    save_file({**tensors, **further}, weights, metadata={"format": "pt"})
    path = tmp_path / "config.json"
    named = {"model_type": "mimo", "attention_bias": True, "num_nextn_predict_layers": 1}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    with pytest.raises(UnknownFamilyError, match=r"those of 'qwen2': .* give --family qwen2\.$"):
        open_model(tmp_path)
    read, beside = open_model(tmp_path, family="qwen2").notes
    assert "attention_bias are passed over" in read and "predict further tokens" in beside


def test_settings_that_no_tensor_shows_are_not_lost(tmp_path: Path) -> None:
    source = renamed(tmp_path, "minicpm", scale_emb=12, scale_depth=1.4)
    told = r"gives scale_emb = 12, scale_depth = 1.4, which that family does not have"
    with pytest.raises(UnknownFamilyError, match=rf"those of 'llama', but its config.json {told}"):
        open_model(source)
    with pytest.raises(UnsupportedError, match=rf"--family llama: config.json {told}"):
        open_model(source, family="llama")


def test_a_model_is_read_as_the_family_that_is_named(tmp_path: Path) -> None:
    source = renamed(tmp_path / "model", some_number=3, vocab_size=VOCABULARY)
    shutil.copy(bundled_model() / "tokenizer.json", source)
    (note,) = open_model(source, family="llama").notes
    assert "'mimo', which is read as 'llama'" in note and "its some_number are passed" in note
    config = ExportConfig(context=32, seq_lengths=(1, 8), bits=8)
    bundle = export(source, output=tmp_path / "out", family="llama", config=config, cache=False)
    manifest = bundle.manifest
    assert manifest.config["source"] == {"family": "llama"}
    assert manifest.spec["model_type"] == "llama"
    assert list(manifest.rebuild)[-8:][:2] == ["--family", "llama"]
    measured = [each.name for each in evaluate(bundle.folder, tokens=32).qualities]
    assert measured == ["original", "quantized", "artifact"]


def test_a_recipe_names_a_family(tmp_path: Path) -> None:
    source = renamed(tmp_path / "model")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {source}\nsource: {{family: llama}}\n")
    assert load_recipe(recipe).config.family == "llama"
    assert open_model(str(recipe)).spec.model_type == "llama"


def test_families_that_cannot_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no family 'lama'; .*Did you mean 'llama'"):
        ExportConfig(family="lama")
    own = save(llama(), tmp_path)
    assert open_model(own, family="llama").notes == ()
    with pytest.raises(UnsupportedError, match=r"model_type 'llama', which has a family of its"):
        open_model(own, family="mistral")


def test_every_causal_lm_of_transformers_is_known() -> None:
    theirs, ours = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), set(known_model_types())
    told = set(known_names())
    assert theirs - ours - told == set(), "say in families/known_types.py what these are"
    assert told - theirs == set(), "transformers has no such causal LM"


def test_the_page_tells_of_each_what_the_refusal_does() -> None:
    script = ROOT / "scripts" / "model_types.py"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    held = (ROOT / "docs" / "model-types.md").read_text()
    assert held == made.stdout, "python scripts/model_types.py > docs/model-types.md"
    for name in known_names():
        known = known_of(name)
        if known is not None and name not in known_model_types():
            assert known.sentence in refusal(model_type=name) and f"`{name}`" in held
