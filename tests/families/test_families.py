"""From `config.json` to a spec: what is read, and what is refused with a way on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from family_table import their_model
from llm_coreml.decoder import skeleton
from llm_coreml.decoder.spec import AttentionSpec, LayerSpec, MLPSpec, NormSpec, RopeSpec
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.families import find_family, known_model_types
from llm_coreml.model import open_model
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from tiny import expected_logits, llama, save, tokens_for

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
            {"rope_scaling": {"rope_type": "axial", "factor": 2.0}},
            "config.json scales RoPE by 'axial'; supported are default, linear, dynamic, llama3, "
            "yarn, longrope, proportional.",
        ),
        (
            {"hidden_act": "elu"},
            "config.json gives hidden_act 'elu'; supported are silu, swish, gelu, gelu_new, "
            "gelu_fast, gelu_pytorch_tanh, quick_gelu, relu, relu2.",
        ),
        (
            {"model_type": "lama"},
            f"model_type 'lama' is not supported; supported are {', '.join(known_model_types())}. "
            "transformers has no such architecture either: it is misspelt, or brings code of its "
            "own, which is not run. Did you mean 'llama'? By its config.json it is nearest to "
            "'llama': a dense decoder, 4 heads. CONTRIBUTING.md tells under 'A model family' how "
            "one is added.",
        ),
    ],
    ids=["rope", "activation", "model_type"],
)
def test_what_the_decoder_does_not_compute_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        spec_of(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"vocab_size": 0}, "vocab_size = 0; it must be a whole number from 1 to 1048576"),
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


@pytest.mark.parametrize("model_type", known_model_types())
def test_no_two_parameters_are_the_same_part_of_a_tensor(model_type: str) -> None:
    family = find_family({"model_type": model_type})
    for tied in (False, True):
        read = family.spec({"model_type": model_type})
        ends = (read.layers[0], read.layers[-1])
        spec = replace(read, layers=ends, tie_word_embeddings=tied)
        stored = family.stored(spec)
        made = {(each.names, repr(each.values)) for each in stored.values()}
        assert len(made) == len(stored)


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
NOT_WHOLE = [0, -1, True, 1.0, 64.5, "4", [4], {"a": 4}, 10**10, 10**30, 10**4000]
NUMBERS = [math.nan, math.inf, -math.inf]
TRUTHS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def refused(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        spec_of(**changes)
    message = str(caught.value)
    assert len(message) < 300 and message.isprintable()
    assert message.endswith("Download or save the model again.")
    return message


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", NOT_WHOLE + NUMBERS, ids=lambda value: str(value)[:12])
def test_sizes_have_a_type_and_a_range(key: str, value: object) -> None:
    told = refused(**{key: value})
    assert f"config.json gives {key} = " in told and "it must be a whole number from 1 to" in told


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize(
    "value", [*NUMBERS, 0, -1e-5, True, "1e-5", [1e-5], {"a": 1}, 1e31, 10**400], ids=str
)
def test_numbers_have_a_type_and_a_range(key: str, value: object) -> None:
    assert f"config.json gives {key} = " in refused(**{key: value})
    if key == "rope_theta":
        scaling = {"rope_parameters": {"rope_type": "default", "rope_theta": value}}
        assert "gives rope_theta = " in refused(**scaling)


@pytest.mark.parametrize("key", TRUTHS)
@pytest.mark.parametrize("value", ["false", "", 0, 1, 2, 0.0, math.nan, [], {}], ids=repr)
def test_nothing_but_true_and_false_is_true_or_false(key: str, value: object) -> None:
    assert f"gives {key} = " in refused(**{key: value})


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor"])
@pytest.mark.parametrize("value", [*NUMBERS, 0, -2.0, True, "8", [8.0], 10**30], ids=str)
def test_factors_have_a_type_and_a_range(key: str, value: object) -> None:
    bands = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {"rope_type": "llama3", **bands, "original_max_position_embeddings": 32, key: value}
    assert f"gives {key} = " in refused(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"hidden_act": 3}, CheckpointError, "hidden_act = 3; it must be a text"),
        ({"rope_scaling": {"rope_type": 3}}, UnsupportedError, "scales RoPE by 3; supported"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            UnsupportedError,
            "to layers of the kind 'full_attention'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            UnsupportedError,
            "partial_rotary_factor = 0.5 beside linear scaling",
        ),
        (
            {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
            UnsupportedError,
            "single layers settings of their own",
        ),
        ({"rope_parameters": []}, CheckpointError, "rope_parameters = a list; it must be an"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_what_has_no_meaning_here_is_refused(
    changes: dict[str, Any], error: type[Exception], part: str
) -> None:
    with pytest.raises(error) as caught:
        spec_of(**changes)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"sliding_window": 0}, CheckpointError, "sliding_window = 0"),
        ({"sliding_window": 1.5}, CheckpointError, "sliding_window = 1.5"),
        ({"layer_types": "full_attention"}, CheckpointError, "it must be a list of 2"),
        ({"layer_types": ["full_attention"]}, CheckpointError, "it must be a list of 2"),
        ({"layer_types": ["full_attention", "conv"]}, UnsupportedError, "of the type 'conv'"),
        (
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None},
            CheckpointError,
            "no sliding_window",
        ),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else None,
)
def test_windows_that_make_no_sense_are_named(
    changes: dict[str, Any], error: type[Exception], part: str
) -> None:
    with pytest.raises(error) as caught:
        spec_of(model_type="mistral", num_key_value_heads=2, **changes)
    assert part in str(caught.value)


def test_sizes_that_the_file_does_not_bear_out_cost_nothing(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    changes = {name: 2**20 for name in SIZES if name != "num_hidden_layers"}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match="misshapen"):
        open_model(folder)
    decoder = skeleton(spec_of(**changes))
    assert all(each.is_meta for each in (*decoder.parameters(), *decoder.buffers()))


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


@pytest.mark.parametrize(
    ("config", "error", "part"),
    [
        ({"model_type": "xglm", "pad_token_id": 5}, UnsupportedError, "pad_token_id = 5"),
        ({"model_type": "xglm", "add_cross_attention": True}, UnsupportedError, "an encoder"),
        (
            {"model_type": "xglm", "max_position_embeddings": 10**9},
            CheckpointError,
            "max_position_embeddings = 1000000000; it must be a whole number from 1 to 65536",
        ),
        ({"model_type": "ctrl", "n_positions": 10**9}, CheckpointError, "from 1 to 65536"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_computed_positions_are_bounded(
    config: dict[str, Any], error: type[Exception], part: str
) -> None:
    with pytest.raises(error) as caught:
        find_family(config).spec(config)
    assert part in str(caught.value)


def test_what_bitnet_rounds_is_told() -> None:
    family = find_family({"model_type": "bitnet"})
    (told,) = family.notes({"quantization_config": {"quant_method": "bitnet"}})
    assert "rounds what each matrix multiplies to 8 bits" in told
    assert family.notes({"quantization_config": {"quant_method": "gptq"}}) == []


def test_matrices_of_an_older_glm_are_found_in_one(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "glm", "head_dim": 16, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = their_model(tmp_path)
    whole = theirs.state_dict()
    kinds = ("weight", "bias")
    for place, kind in ((p, k) for p in range(config["num_hidden_layers"]) for k in kinds):
        front = f"model.layers.{place}.self_attn"
        parts = [whole.pop(f"{front}.{part}_proj.{kind}") for part in "qkv"]
        whole[f"{front}.qkv_proj.{kind}"] = torch.cat(parts)
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    tokens = tokens_for(97, 24)
    decoder = build_original(open_model(tmp_path), 24)
    found = EagerRunner(decoder, "eager").logits(tokens)
    assert (found - expected_logits(theirs, tokens)).abs().max() < 1e-4
