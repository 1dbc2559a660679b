"""GGUF files, written by llama.cpp's own package, and files that are damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import gguf_files
from gguf_files import tiny
from llm_coreml.checkpoint import open_checkpoint
from llm_coreml.checkpoint.packed import PackedCheckpoint
from llm_coreml.checkpoint.packed.blocks import BLOCKS
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.plan.choose import plan_for
from llm_coreml.quantize.plan.imported import import_report
from llm_coreml.quantize.quantized import build_decoder
from tiny import save

Array = np.ndarray[Any, Any]


def write(folder: Path, kinds: dict[str, Kind], architecture: str = "llama") -> dict[str, Array]:
    """Write config.json and model.gguf; return the values of matrices by `transformers` names."""
    model = tiny()
    save(model, folder)
    (folder / "model.safetensors").unlink()
    meant = gguf_files.write(
        folder / "model.gguf",
        model,
        kinds,
        architecture=architecture,
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(32, np.float32)),
    )
    return {name: values for name, values in meant.items() if values.ndim == 2}


def decoder_values(path: Path, **settings: Any) -> dict[str, Array]:
    config = ExportConfig(context=32, embedding="none", **settings)
    model = open_model(str(path))
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, plan_for(job, model))
    stored = model.family.stored(model.spec)
    return {
        stored[ours].names[0]: torch.cat(list(dense_rows(parameter))).numpy()
        for ours, parameter in decoder.named_parameters()
        if parameter.ndim == 2
    }


def test_exact_formats_keep_every_value(tmp_path: Path) -> None:
    kinds = {
        "q_proj": Kind.Q4_0,
        "k_proj": Kind.Q8_0,
        "v_proj": Kind.Q5_0,
        "gate_proj": Kind.MXFP4,
        "up_proj": Kind.IQ4_NL,
        "lm_head": Kind.Q8_0,
    }
    meant = write(tmp_path, kinds)
    for path in (tmp_path, tmp_path / "model.gguf"):
        held = decoder_values(path)
        assert held.keys() == meant.keys()
        for name, values in meant.items():
            assert np.array_equal(held[name], values), name
    report = import_report(open_model(tmp_path).checkpoint)
    assert report is not None
    assert report.format == "GGUF IQ4_NL, GGUF MXFP4, GGUF Q4_0, GGUF Q5_0, GGUF Q8_0"
    assert report.matrices == 6
    assert report.exactness == "exact"


@pytest.mark.parametrize(
    "kinds",
    [
        {
            "q_proj": Kind.Q4_1,
            "k_proj": Kind.Q4_K,
            "v_proj": Kind.Q6_K,
            "up_proj": Kind.Q4_K,
            "down_proj": Kind.Q5_K,
            "lm_head": Kind.Q6_K,
        },
        {
            "q_proj": Kind.Q2_K,
            "k_proj": Kind.Q3_K,
            "v_proj": Kind.Q5_1,
            "up_proj": Kind.IQ4_XS,
            "down_proj": Kind.Q3_K,
            "lm_head": Kind.Q2_K,
        },
    ],
)
def test_inexact_formats_need_leave_and_tell_their_error(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    meant = write(tmp_path, kinds)
    with pytest.raises(UnsupportedError, match=r"GGUF Q.*is off by up to .*--allow-inexact"):
        decoder_values(tmp_path)
    held = decoder_values(tmp_path, allow_inexact=True)
    report = import_report(open_model(tmp_path).checkpoint)
    assert report is not None and report.matrices == 6
    stored = open_checkpoint(tmp_path)
    for name, values in meant.items():
        assert np.array_equal(stored.tensor(name, torch.float32).numpy(), values), name
        # Random blocks have minimums far from their codes, and zero points are fp16 numbers.
        far = np.abs(held[name] - values).max() / np.abs(values).max()
        assert far < 2**-10, name


def test_a_part_with_no_scale_but_a_minimum_keeps_its_value(tmp_path: Path) -> None:
    meant = write(tmp_path, {"v_proj": Kind.Q4_K})
    name = "model.layers.0.self_attn.v_proj.weight"
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, PackedCheckpoint)
    octets = checkpoint.files.stored(name.replace("weight", "Q4_K"))
    octets[:, 4] &= 0xC0  # the scale of the first 32 weights of each block
    values = checkpoint.tensor(name, torch.float32)
    assert float(values[:, :32].abs().min()) > 0
    assert not np.array_equal(values.numpy(), meant[name])
    packed = checkpoint.packed(name)
    assert packed is not None and packed.levels.zero_point is not None
    scale, zero = (part[:, :1] for part in (packed.levels.scale, packed.levels.zero_point))
    held = scale * (packed.codes[:, :32] - zero)
    assert torch.allclose(held, values[:, :32], rtol=2**-10)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def patch(start: int, layout: str, value: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        octets = bytearray(path.read_bytes())
        struct.pack_into(layout, octets, start, value)
        path.write_bytes(octets)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"ends after \d+ bytes, before the end of"),
        (cut_header, r"ends after 100 bytes, inside its header"),
        (patch(0, "<I", 0), r"does not begin with GGUF"),
        (patch(4, "<I", 9), r"of version 9, and 2 and 3 are read"),
        (patch(8, "<Q", 2**63), r"is no whole GGUF file"),
        (patch(16, "<Q", 2**63), r"is no whole GGUF file"),
        (patch(24, "<Q", 2**62), r"inside its header"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path, {"q_proj": Kind.Q4_0})
    damage(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path / "a", {}, architecture="plamo")
    with pytest.raises(
        UnsupportedError, match="architecture 'plamo'; of GGUF files are read apertus,"
    ):
        open_model(tmp_path / "a")
    write(tmp_path / "b", {"q_proj": Kind.Q5_0})
    octets = (tmp_path / "b" / "model.gguf").read_bytes()
    place = octets.index(b"blk.0.attn_q.weight") + 19 + 4 + 2 * 8
    assert octets[place] == Kind.Q5_0
    (tmp_path / "b" / "model.gguf").write_bytes(octets[:place] + b"\x09" + octets[place + 1 :])
    with pytest.raises(UnsupportedError, match=r"blk.0.attn_q.weight.*type 9 of GGUF; Q4_0"):
        open_model(tmp_path / "b")
    (tmp_path / "b" / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models: 'model.gguf', 'other.gguf'"):
        open_model(tmp_path / "b")


def test_types_that_core_ml_cannot_hold_are_read_as_values(tmp_path: Path) -> None:
    kinds = {
        "q_proj": Kind.IQ2_XXS,
        "k_proj": Kind.IQ3_S,
        "v_proj": Kind.TQ1_0,
        "o_proj": Kind.IQ1_S,
        "gate_proj": Kind.IQ3_XXS,
        "up_proj": Kind.IQ2_XS,
        "down_proj": Kind.IQ2_S,
        "lm_head": Kind.TQ2_0,
    }
    meant = write(tmp_path, kinds)
    checkpoint = open_checkpoint(tmp_path)
    for name, values in meant.items():
        assert np.array_equal(checkpoint.tensor(name, torch.float32).numpy(), values), name
    with pytest.raises(UnsupportedError, match=r"is stored as .*Give --bits 4"):
        decoder_values(tmp_path)


def test_sizes_of_blocks_are_those_of_llama_cpp() -> None:
    for number, form in BLOCKS.items():
        kind = Kind(number)
        assert form.name == kind.name
        assert (form.elements, form.size) == gguf.GGML_QUANT_SIZES[kind]


def test_heads_that_config_json_counts_otherwise(tmp_path: Path) -> None:
    write(tmp_path, {})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["num_attention_heads"] //= 2
    config["num_key_value_heads"] //= 2
    config["head_dim"] *= 2
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"orders the rows of .* heads, and config.json"):
        decoder_values(tmp_path / "model.gguf", scheme="none")
