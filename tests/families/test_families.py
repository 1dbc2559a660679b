"""From `config.json` to a spec: what is read, and what is refused with a way on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_coreml.decoder.spec import AttentionSpec, LayerSpec, MLPSpec, NormSpec, RopeSpec
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.families import find_family, known_model_types
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from tiny import llama, mistral, save

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def spec_of(**changes: Any) -> Any:
    config = {**LLAMA, **changes}
    return find_family(config).spec(config)


def test_silent_options_take_the_defaults_of_transformers() -> None:
    spec = spec_of()
    norm = NormSpec(1e-6)
    attention, mlp = AttentionSpec(4, 4, 16, norm=norm), MLPSpec(80, norm=norm)
    assert spec.layers == 2 * (LayerSpec(attention, mlp),)
    assert spec.max_position_embeddings == 2048
    assert spec.norm == norm
    assert spec.rotary == (RopeSpec(16, original_max_position_embeddings=2048),)
    assert not spec.tie_word_embeddings


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ],
    ids=["type", "rope_type", "transformers-5"],
)
def test_rope_is_read_in_its_three_spellings(changes: dict[str, Any]) -> None:
    expected = RopeSpec(16, 5e5, "linear", factor=4.0, original_max_position_embeddings=2048)
    assert spec_of(**changes).rotary == (expected,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "config.json scales RoPE by 'yarn'; supported are default, linear, dynamic, llama3.",
        ),
        (
            {"hidden_act": "gelu"},
            "config.json gives hidden_act 'gelu'; this family computes silu only.",
        ),
        (
            {"sliding_window": 16},
            "config.json gives sliding_window = 16; attention windows are not supported yet. Set "
            "it to null in config.json only if the model was trained without one.",
        ),
        (
            {"model_type": "lama"},
            "model_type 'lama' is not supported; supported are llama, mistral. transformers has no "
            "such architecture either: it is misspelt, or brings code of its own, which is not "
            "run. Did you mean 'llama'?",
        ),
        (
            {"model_type": "mistral"},
            "config.json gives sliding_window = 4096; attention windows are not supported yet. Set "
            "it to null in config.json only if the model was trained without one.",
        ),
    ],
    ids=["rope", "activation", "window", "model_type", "mistral-default"],
)
def test_what_the_decoder_does_not_compute_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        spec_of(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("model_type", "fields", "told"),
    [
        (
            "mixtral",
            {"num_key_value_heads": 2},
            "nearest in shape to 'llama': a dense decoder, 4 heads on 2 of keys",
        ),
        ("mixtral", {"num_local_experts": 8}, r"mixture of experts \(num_local_experts = 8\)"),
        ("deepseek_v2", {"kv_lora_rank": 512}, "decoder with latent attention"),
        ("falcon_h1", {"mamba_d_state": 64}, "layers of state in the place of attention"),
        ("gemma3", {"text_config": {"a": 1}}, "several modalities"),
        ("t5", {"is_encoder_decoder": True}, "encoder with a decoder"),
        ("gpt2", {"n_embd": 768}, "learned positions"),
        ("qwen2", {"sliding_window": 4096}, "nearest in shape to 'mistral': .* window of 4096"),
        ("gemma2", {"final_logit_softcapping": 30.0}, r"capped logits \(final_logit_softcapp"),
        ("gemma", {"hidden_act": "gelu\x1b[31m" * 99}, r"activation of gelu\\x1b\[31m"),
        ("gemma3_text", {"layer_types": ["full", "sliding"]}, "change from layer to layer"),
        ("qwen3", {"layer_types": ["full", "full"], "num_attention_heads": [4]}, "dense decoder"),
        ("bloom", {"intermediate_size": None}, "of a kind that its fields do not tell"),
    ],
)
def test_a_missing_family_is_told_by_its_shape_and_not_by_its_name(
    model_type: str, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(UnsupportedError, match=told) as caught:
        spec_of(model_type=model_type, **fields)
    text = str(caught.value)
    assert text.startswith(f"model_type '{model_type}' is not supported; supported are llama, mist")
    assert "Did you mean" not in text and text.endswith("Give a model of one of these types.")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"vocab_size": 0}, "vocab_size = 0; it must be a whole number of at least 1"),
        ({"hidden_size": 64.0}, "hidden_size = 64.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"num_key_value_heads": 3}, "4 attention heads and 3 key/value heads"),
        ({"head_dim": 15}, "head_dim = 15; rotary embeddings need an even one"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "The llama3 scaling of RoPE in config.json has no low_freq_factor",
        ),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            "The linear scaling of RoPE in config.json has no factor",
        ),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"num_attention_heads": "4"}, "num_attention_heads = '4'"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps = 'x'; it must be a number above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'; it must be an object"),
    ],
)
def test_sizes_that_make_no_sense_are_named(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_of(**changes)
    assert part in str(caught.value)


@pytest.mark.parametrize("key", sorted(set(LLAMA) - {"model_type"}))
def test_a_missing_size_is_named(key: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(CheckpointError, match=f"has no {key}, which this family needs"):
        find_family(config).spec(config)


@pytest.mark.parametrize("model_type", known_model_types())
def test_every_family_names_each_parameter_once(model_type: str) -> None:
    for tied in (False, True):
        spec = spec_of(
            model_type=model_type,
            sliding_window=None,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attention_bias=True,
            mlp_bias=True,
        )
        family = find_family({"model_type": model_type})
        stored = family.stored(spec)
        assert len({made.names for made in stored.values()}) == len(stored)
        assert len(stored) == 2 * 16 + (2 if tied else 3)


def test_a_window_in_the_file_is_refused_when_the_folder_is_opened(tmp_path: Path) -> None:
    folder = save(mistral(sliding_window=16), tmp_path)
    with pytest.raises(UnsupportedError, match="sliding_window = 16"):
        open_model(folder)


def test_dynamic_rope_past_the_trained_length_is_refused(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = open_model(folder)
    build_original(model, context=32)
    with pytest.raises(UnsupportedError) as caught:
        build_original(model, context=64)
    assert str(caught.value) == (
        "rope_scaling 'dynamic' changes its angles past 32 positions, which a fixed table of 64 "
        "cannot hold; use --context 32 or less."
    )


def test_null_fields_mean_the_default() -> None:
    nulls = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "mlp_bias": None}
    assert spec_of(**nulls) == spec_of()


def test_the_trained_length_beside_the_sizes_wins() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    spec = spec_of(rope_scaling=scaling, original_max_position_embeddings=8192)
    assert spec.rotary[0].original_max_position_embeddings == 8192
    assert spec_of(rope_scaling=scaling).rotary[0].original_max_position_embeddings == 4096
