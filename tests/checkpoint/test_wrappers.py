"""Models of several modalities: their text model is read, and the rest is told and left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    SiglipVisionConfig,
)

from gguf_files import tiny, write
from llm_coreml.checkpoint.layouts import ordinary_names
from llm_coreml.checkpoint.wrappers import is_tied, text_part
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from packers import Packer, checkpoint, gptq, mlx
from tiny import BASE, expected_logits, randomize, save, tokens_for

CONTEXT = 64
TEXT = {**BASE, "num_hidden_layers": 2, "head_dim": 16, "pad_token_id": 0}
_TURNS = ["sliding_attention", "sliding_attention", "full_attention"]
SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava(tied: bool = False) -> Any:
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**SIGHT),
        image_token_id=96,
        tie_word_embeddings=tied,
    )
    return randomize(LlavaForConditionalGeneration(config))


def mistral3(tied: bool = False) -> Any:
    config = Mistral3Config(
        text_config=MistralConfig(**{**TEXT, "sliding_window": None}),
        vision_config=PixtralVisionConfig(**SIGHT),
        image_token_id=96,
        tie_word_embeddings=tied,
    )
    return randomize(Mistral3ForConditionalGeneration(config))


def idefics3(tied: bool = False) -> Any:
    config = Idefics3Config(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=SIGHT,
        image_token_id=96,
        tie_word_embeddings=tied,
        scale_factor=1,
    )
    return randomize(Idefics3ForConditionalGeneration(config))


def gemma3(tied: bool = False) -> Any:
    text = {**TEXT, "tie_word_embeddings": tied, "sliding_window": 9, "num_hidden_layers": 3}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text, layer_types=_TURNS),
        vision_config=SiglipVisionConfig(**SIGHT),
        mm_tokens_per_image=4,
        image_token_id=96,
        tie_word_embeddings=tied,
    )
    return randomize(Gemma3ForConditionalGeneration(config))


def gemma4(tied: bool = False) -> Any:
    text = {
        **TEXT,
        "tie_word_embeddings": tied,
        "sliding_window": 9,
        "num_hidden_layers": 3,
        "global_head_dim": 32,
    }
    config = Gemma4Config(
        text_config=Gemma4TextConfig(
            **text,
            layer_types=_TURNS,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=97,
        ),
        vision_config=Gemma4VisionConfig(
            **{**SIGHT, "num_key_value_heads": 2, "head_dim": 8}, position_embedding_size=16
        ),
        audio_config=None,
        image_token_id=96,
        tie_word_embeddings=tied,
    )
    return randomize(Gemma4ForConditionalGeneration(config))


WHOLE: dict[str, Callable[[bool], Any]] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "llava": llava,
    "mistral3": mistral3,
    "idefics3": idefics3,
}


def assert_same(source: Any, reference: Any) -> tuple[str, ...]:
    """Hold the text model of `source` against the whole; return what was told of it."""
    tokens = tokens_for(96, CONTEXT)
    expected = expected_logits(reference, tokens)
    assert expected.abs().max() > 1, "tiny logits would hide differences"
    model = open_model(source)
    found = EagerRunner(build_original(model, CONTEXT), "eager").logits(tokens)
    assert (found - expected).abs().max() < 1e-4
    return model.notes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", WHOLE)
def test_the_text_model_is_read_and_the_rest_is_told(kind: str, tied: bool, tmp_path: Path) -> None:
    reference = WHOLE[kind](tied)
    seen = {name: w.nbytes for name, w in reference.state_dict().items() if ".vision_" in name}
    for source in (save(reference, tmp_path), reference):
        (note,) = (note for note in assert_same(source, reference) if "modalities" in note)
        assert note.startswith(f"'{kind}' is a model of several modalities")
        assert f"({sum(seen.values()):,} bytes)" in note
    assert open_model(tmp_path).spec.tie_word_embeddings is tied


@pytest.mark.parametrize(
    "front", ["language_model.model.", "model.language_model.", "model.text_model.", "llm.model."]
)
def test_every_spelling_of_names(front: str, tmp_path: Path) -> None:
    reference = llava()
    folder = save(reference, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    text = [name for name in tensors if "language_model.model." in name]
    assert text
    renamed = {name.replace("language_model.model.", front): w for name, w in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert_same(folder, reference)


def test_names_that_only_look_like_the_text_model() -> None:
    names = ["vision_tower.layers.0.norm.weight", "audio_tower.norm.weight", "projector.weight"]
    layout = ordinary_names([*names, "model.language_model.norm.weight"], among_others=True)
    assert layout.beside == tuple(sorted(names))
    assert layout.names == {"model.norm.weight": "model.language_model.norm.weight"}


def test_what_lies_in_the_text_model_and_nothing_reads_is_refused(tmp_path: Path) -> None:
    folder = save(llava(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.0.extra.weight"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 surplus: 'model.layers.0.extra.weight'"):
        open_model(folder)


def test_what_the_whole_model_says_holds_for_its_text_model() -> None:
    config = {
        "model_type": "llava",
        "eos_token_id": [1, 106],
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "quantization": {"bits": 4, "group_size": 32, "language_model.model.layers.0.x": False},
        "text_config": {"model_type": "llama", "eos_token_id": 1, "tie_word_embeddings": False},
    }
    part = text_part(config)
    assert part.whole == "llava"
    assert part.config == {
        "model_type": "llama",
        "eos_token_id": [1, 106],
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "quantization": {"bits": 4, "group_size": 32, "model.layers.0.x": False},
    }
    assert text_part({"model_type": "llama"}).whole is None


def test_a_text_model_that_names_no_type_is_that_of_the_whole() -> None:
    part = text_part({"model_type": "gemma3", "text_config": {"hidden_size": 8}})
    assert part.config["model_type"] == "gemma3_text"
    assert part.config["tie_word_embeddings"] is True
    with pytest.raises(CheckpointError, match="gives the text model of 'mine' no model_type"):
        text_part({"model_type": "mine", "text_config": {}})
    with pytest.raises(CheckpointError, match="gives text_config of type list"):
        text_part({"model_type": "gemma3", "text_config": []})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "clip", "text_config": {}}, "'clip' does not write text"),
        ({"model_type": "paligemma", "text_config": {}}, "reads its prompt in both directions"),
        (
            {
                "model_type": "qwen3_5",
                "text_config": {"model_type": "qwen3_5_text", "linear_num_value_heads": 16},
            },
            "'qwen3_5_text' is not supported",
        ),
        ({"model_type": "whisper", "encoder_layers": 4}, "an encoder with a decoder"),
        ({"model_type": "siglip_vision_model", "hidden_size": 4}, "is not supported"),
    ],
)
def test_what_is_no_text_model_is_refused(
    config: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=told):
        open_model(tmp_path)


def test_an_adapter_of_the_whole_model_is_merged(tmp_path: Path) -> None:
    reference = llava()
    folder = save(reference, tmp_path)
    module = "model.language_model.layers.0.self_attn.q_proj"
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {module: 32}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tower = "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    parts = {
        f"base_model.model.{module}.lora_A.weight": torch.full((4, 64), 0.02),
        f"base_model.model.{module}.lora_B.weight": torch.full((64, 4), 0.03),
        f"base_model.model.{tower}.lora_A.weight": torch.ones(4, 16),
        f"base_model.model.{tower}.lora_B.weight": torch.ones(24, 4),
    }
    save_file(parts, folder / "adapter_model.safetensors")
    with torch.no_grad():
        # Four columns of products, and an alpha of 32 by a rank of 4.
        reference.get_submodule(module).weight.add_(4 * 0.02 * 0.03 * 8)
    notes = assert_same(folder, reference)
    assert any("2 tensors of the adapter are left out" in note for note in notes)


def test_a_projector_beside_a_gguf_model_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", tiny(), {})
    projector = tmp_path / "mmproj-model-f16.gguf"
    write(projector, tiny(), {}, architecture="clip")
    assert open_model(tmp_path).spec.hidden_size == 256
    for source in (projector, tmp_path):
        (tmp_path / "model.gguf").unlink(missing_ok=True)
        with pytest.raises(UnsupportedError, match=r"\(mmproj\), and no language model"):
            open_model(source)


@pytest.mark.parametrize(
    ("settings", "packer"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq(4, 32, 1, (8, 8))),
        # A rule for a module, under the name that it has in the whole model.
        ({"bits": 3, "group_size": 16}, mlx(4, 32, True)),
    ],
)
def test_quantized_matrices_are_taken_as_they_are(
    settings: dict[str, Any], packer: Packer, tmp_path: Path
) -> None:
    folder, _ = checkpoint(tmp_path / "plain", {"quantization_config": settings}, packer)
    tensors = load_file(folder / "model.safetensors")
    if "quant_method" not in settings:
        modules = {n.removesuffix(".scales") for n in tensors if n.endswith(".scales")}
        rules = {module: {"bits": 4, "group_size": 32} for module in modules}
        configure(folder, quantization_config={**settings, **rules})
    plain = open_model(folder)
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    renamed = {f"language_model.{name}": w for name, w in tensors.items()}
    renamed["vision_tower.norm.weight"] = torch.ones(4)
    save_file(renamed, wrapped / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    config = text.pop("quantization_config")
    rules = {f"language_model.{k}" if "." in k else k: v for k, v in config.items()}
    whole = {"model_type": "llava", "text_config": text, "quantization_config": rules}
    (wrapped / "config.json").write_text(json.dumps(whole))
    model = open_model(wrapped)
    assert plain.weights.forms()
    assert model.weights.forms() == plain.weights.forms()
    for name in plain.weights.forms():
        ours, theirs = model.weights.packed(name), plain.weights.packed(name)
        assert ours is not None and theirs is not None
        assert torch.equal(ours.codes, theirs.codes)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("model_type", "tied"), [("gemma4_assistant", True), ("nougat", False)])
def test_a_type_that_cannot_be_built_of_nothing(model_type: str, tied: bool) -> None:
    assert is_tied({"model_type": model_type}) is tied
