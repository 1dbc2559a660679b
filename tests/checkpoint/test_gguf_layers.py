"""GGUF files of models whose layers differ: Gemma 4, and numbers of each layer in metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from family_table import their_model, write_config
from gguf_converter import convert, rounded
from llm_coreml.errors import CheckpointError, LlmCoreMLError, UnsupportedError
from llm_coreml.families import find_family
from llm_coreml.model import open_model

FORMS: dict[str, dict[str, Any]] = {
    "one-matrix": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
    },
    "both": {"attention_k_eq_v": True, "num_kv_shared_layers": 2},
    "turned": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 5e5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    },
}
Meant = dict[str, torch.Tensor]


def gemma(folder: Path, **changes: Any) -> tuple[Any, Meant]:
    apart = folder / "apart"
    apart.mkdir(exist_ok=True)
    write_config(apart, "gemma4_text", changes)
    theirs = their_model(apart)
    return theirs, convert(folder / "model.gguf", "gemma4", theirs)


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_differ(form: str, tmp_path: Path) -> None:
    theirs, meant = gemma(tmp_path, **FORMS[form])
    model = open_model(tmp_path / "model.gguf")
    config = theirs.config.to_dict()
    expected = find_family(config).spec(config)
    assert rounded(model.spec) == rounded(expected)
    assert model.checkpoint.names() == meant.keys()
    for name, values in meant.items():
        assert torch.equal(model.checkpoint.tensor(name, torch.float32), values), name


def test_a_config_beside_is_held_against_the_file(tmp_path: Path) -> None:
    theirs, _ = gemma(tmp_path)
    theirs.config.save_pretrained(tmp_path)
    assert open_model(tmp_path / "model.gguf").spec.layers[0].mixer.head_dim == 16
    theirs.config.rope_parameters["full_attention"]["partial_rotary_factor"] = 0.5
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"turns 0\.25 of each head, and config.json 0\.5"):
        open_model(tmp_path / "model.gguf")


def altered(source: Path, change: Callable[[gguf.GGUFWriter], None], **more: Any) -> Path:
    """Write a file's metadata and tensors again, some of them otherwise."""
    reader, path = gguf.GGUFReader(source), source.with_name("altered.gguf")
    writer = gguf.GGUFWriter(path, more.get("architecture", "gemma4"))
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, more.get(tensor.name, np.array(tensor.data)))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_keys_of_layers_that_share_them_are_passed_over(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        kind = gguf.GGMLQuantizationType.Q8_0
        rows = gguf.quants.quantize(np.ones((32, 64), np.float32), kind)
        for name in ("k", "v"):
            writer.add_tensor(f"blk.4.attn_{name}.weight", rows, raw_dtype=kind)
        writer.add_tensor("blk.4.attn_k_norm.weight", np.ones(16, np.float32))

    gemma(tmp_path, num_kv_shared_layers=3)
    model = open_model(altered(tmp_path / "model.gguf", more))
    assert model.spec.layers[4].mixer.shares == 1


WRONG: dict[str, tuple[Callable[[gguf.GGUFWriter], None], type[LlmCoreMLError], str]] = {
    "widths": (
        lambda writer: writer.add_feed_forward_length([80, 80, 80, 80, 90, 90]),
        UnsupportedError,
        r"feed_forward_length = \[80, 80, 80, 80, 90, 90\], which config.json cannot say",
    ),
    "heads": (
        lambda writer: writer.add_head_count_kv([2, 1, 2, 2, 2, 2]),
        UnsupportedError,
        "layers of one kind differ",
    ),
    "few": (
        lambda writer: writer.add_head_count_kv([2, 2]),
        CheckpointError,
        "one entry for each of 6 layers",
    ),
    "rotated": (
        lambda writer: writer.add_rope_dimension_count(24),
        UnsupportedError,
        r"heads of \[24, 32\]",
    ),
    "another": (
        lambda writer: writer.add_float32("gemma4.attention.logit_whim", 1.0),
        UnsupportedError,
        "gemma4.attention.logit_whim, which is not understood",
    ),
    "experts": (
        lambda writer: writer.add_expert_count(128),
        UnsupportedError,
        "a mixture of experts beside the dense layers",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_config_cannot_say_is_refused(wrong: str, tmp_path: Path) -> None:
    gemma(tmp_path)
    change, error, words = WRONG[wrong]
    with pytest.raises(error, match=words):
        open_model(altered(tmp_path / "model.gguf", change))


def test_factors_that_turn_no_share_are_refused(tmp_path: Path) -> None:
    gemma(tmp_path)
    factors = {"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}
    path = altered(tmp_path / "model.gguf", lambda writer: None, **factors)
    with pytest.raises(UnsupportedError, match="say of no share of a head"):
        open_model(path)


def test_gemma_3n_is_refused_with_the_reason(tmp_path: Path) -> None:
    gemma(tmp_path)
    path = altered(tmp_path / "model.gguf", lambda writer: None, architecture="gemma3n")
    with pytest.raises(UnsupportedError, match="four residual streams"):
        open_model(path)


def apertus(folder: Path) -> Path:
    apart = folder / "apart"
    apart.mkdir()
    write_config(apart, "apertus", {})
    convert(folder / "model.gguf", "apertus", their_model(apart))
    return folder / "model.gguf"


def test_one_number_in_metadata_holds_for_all_layers(tmp_path: Path) -> None:
    def one(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("xielu.alpha_p", 0.75)

    checkpoint = open_model(altered(apertus(tmp_path), one, architecture="apertus")).checkpoint
    for index in range(2):
        name = f"model.layers.{index}.mlp.act_fn.alpha_p"
        assert checkpoint.tensor(name, torch.float32).tolist() == [0.75]
        assert checkpoint.where(name) == "altered.gguf"


@pytest.mark.parametrize("values", [[0.5], [0.5, float("nan")], "much", None])
def test_numbers_of_layers_that_are_damaged_are_refused(values: Any, tmp_path: Path) -> None:
    def wrong(writer: gguf.GGUFWriter) -> None:
        if isinstance(values, list):
            writer.add_xielu_alpha_n(values)
        elif values is None:
            writer.kv_data[0].pop("xielu.alpha_n")
        else:
            writer.add_string("xielu.alpha_n", values)

    with pytest.raises(CheckpointError, match=r"xielu.alpha_n = .* a number for each of 2 layers"):
        open_model(altered(apertus(tmp_path), wrong, architecture="apertus"))
