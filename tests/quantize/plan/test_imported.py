"""Quantized checkpoints keep their values, weight by weight, or say by how much they do not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.pipeline import export
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.formats.schemes import IntGroup
from llm_coreml.quantize.plan.choose import plan_for
from llm_coreml.quantize.plan.imported import import_report
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import ReferenceRunner
from packers import (
    FLOATS,
    Array,
    Packer,
    affine,
    awq,
    bitnet,
    checkpoint,
    compressed,
    dealt,
    fp8,
    gptq,
    hqq,
    int8,
    mlx,
    mxfp4,
    nf4,
    plain_bytes,
)
from tiny import llama

CONFIG = ExportConfig(context=32, seq_lengths=(1, 8))


def with_method(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **settings}}


def groups(bits: int, size: int | None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "group_size": size}
    return with_method("compressed-tensors", config_groups={"group_0": {"weights": weights}})


V1 = with_method("gptq", bits=4, group_size=32)
V2 = with_method("gptq", bits=4, group_size=32, checkpoint_format="gptq_v2")
BYTES = with_method("gptq", bits=8, group_size=16)

THREE = with_method("gptq", bits=3, group_size=32)
TWO = with_method("gptq", bits=2, group_size=32, checkpoint_format="gptq_v2")
MLX = {"quantization": {"group_size": 32, "bits": 4}}
MXFP4 = with_method(
    "compressed-tensors",
    format="mxfp4-pack-quantized",
    config_groups={"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}},
)
HQQ = with_method("hqq", quant_config={}, skip_modules=["lm_head"])

EXACT: dict[str, tuple[dict[str, Any], tuple[Packer, ...]]] = {
    "gptq-symmetric": (V1, (gptq(4, 32, 1, (8, 8)),)),
    "gptq-asymmetric": (V1, (gptq(4, 32, 1, (1, 15)),)),
    "gptq-zero-of-16": (V1, (gptq(4, 32, 1, (1, 16)),)),
    "gptq-v2": (V2, (gptq(4, 32, 2, (0, 15)),)),
    "gptq-8-bit": (BYTES, (gptq(8, 16, 1, (128, 128)), gptq(8, 16, 1, (1, 256)))),
    "gptq-3-bit": (THREE, (gptq(3, 32, 1, (4, 4)), gptq(3, 32, 1, (1, 8)))),
    "gptq-2-bit": (TWO, (gptq(2, 32, 2, (0, 3)),)),
    "gptq-dynamic": (
        with_method("gptq", bits=4, group_size=32, dynamic={r".*\.mlp\..*": {"bits": 8}}),
        (gptq(4, 32, 1, (1, 16)), gptq(8, 16, 1, (1, 256)), gptq(3, 32, 1, (1, 8))),
    ),
    "auto-round": (
        with_method("auto-round", bits=4, group_size=32, packing_format="auto_round:auto_gptq"),
        (gptq(4, 32, 1, (8, 8)), gptq(8, 16, 1, (128, 128))),
    ),
    "auto-round-awq": (
        with_method("auto-round", bits=4, group_size=32, packing_format="auto_round:auto_awq"),
        (awq(32),),
    ),
    "awq": (with_method("awq", bits=4, group_size=32), (awq(32),)),
    "compressed-4-bit": (groups(4, 16), (compressed(4, 16, True), compressed(4, 16, False))),
    "compressed-plain-zeros": (groups(4, 16), (compressed(4, 16, False, plain=True),)),
    "compressed-8-bit": (groups(8, 32), (compressed(8, 32, True), compressed(8, 32, False))),
    "compressed-bytes": (groups(8, None), (plain_bytes,)),
    "mlx": (MLX, (mlx(4, 32, whole=True),)),
    "mlx-6-bit": (
        {"quantization": {"group_size": 32, "bits": 6}},
        (mlx(6, 32, whole=True),),
    ),
    "hqq": (HQQ, (hqq(4, 32, (4, 12)), hqq(8, 16, (100, 156)))),
    "bitnet": (
        with_method("bitnet", linear_class="autobitlinear", quantization_mode="offline"),
        (bitnet(divides=False),),
    ),
    "mlx-mxfp4": ({"quantization": {**MLX["quantization"], "mode": "mxfp4"}}, (mxfp4(True),)),
    "compressed-mxfp4": (MXFP4, (mxfp4(False),)),
}
INEXACT: dict[str, tuple[dict[str, Any], tuple[Packer, ...], float]] = {
    "mlx": (MLX, (mlx(4, 32, whole=False),), 0.005),
    "mlx-8-bit": ({"quantization": {"group_size": 16, "bits": 8}}, (mlx(8, 16, False),), 0.05),
    "hqq": (HQQ, (hqq(4, 32, (0, 16)),), 0.002),
    # One over a scale is no fp16 number.
    "bitnet": (with_method("bitnet"), (bitnet(divides=True),), 0.0005),
}


def decoder_values(folder: Path, config: ExportConfig = CONFIG) -> dict[str, Array]:
    """Return every matrix of the decoder, by its checkpoint's name."""
    model = open_model(folder)
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, plan_for(job, model))
    stored = model.family.stored(model.spec)
    found = {}
    for ours, parameter in decoder.named_parameters():
        if parameter.ndim == 2 and ours in stored:
            found[stored[ours].names[0]] = torch.cat(list(dense_rows(parameter))).double().numpy()
    return found


@pytest.mark.parametrize("label", EXACT)
def test_every_value_is_the_one_that_the_format_defines(label: str, tmp_path: Path) -> None:
    settings, packers = EXACT[label]
    folder, meant = checkpoint(tmp_path / "model", settings, *packers)
    held = decoder_values(folder)
    model = open_model(folder)
    assert len(meant) == 7
    newest = decoder_values(folder, replace(CONFIG, minimum_os="iOS26"))
    for name, values in meant.items():
        assert np.array_equal(held[name], values), name
        assert np.array_equal(newest[name], values), name
        assert np.array_equal(model.checkpoint.tensor(name, torch.float32).numpy(), values), name
    report = import_report(model.checkpoint)
    assert report is not None
    assert (report.exactness, report.largest_error, report.tensor) == ("exact", 0.0, None)
    assert report.matrices == 7


def steps(values: Array, group: int) -> Array:
    """Return the distance between two codes for each weight; every group has both ends."""
    grouped = values.reshape(len(values), -1, group)
    return np.repeat(np.ptp(grouped, axis=2), group, axis=1)


@pytest.mark.parametrize(
    ("settings", "packer"),
    [(V1, gptq(4, 32, 1, (1, 16), seed=3)), (groups(4, 16), compressed(4, 16, False, seed=4))],
    ids=["gptq", "compressed"],
)
def test_activation_order_is_a_gather_of_the_inputs(
    settings: dict[str, Any], packer: Packer, tmp_path: Path
) -> None:
    folder, meant = checkpoint(tmp_path / "model", settings, packer)
    model = open_model(folder)
    for name, values in meant.items():
        assert np.array_equal(model.checkpoint.tensor(name, torch.float32).numpy(), values), name
    job = resolve(CONFIG, model.spec)
    decoder = build_decoder(model, job, plan_for(job, model))
    gathers = [name for name, _ in decoder.named_buffers() if name.endswith("input_order")]
    assert len(gathers) == 4, "one for q, k, v; for o; for gate, up; for down"
    tokens = torch.arange(20).view(1, -1)
    config = replace(CONFIG, embedding="none", logits="all")
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, plan_for(job, model))
    plain = build_decoder(
        model, job, make_plan(resolve(replace(config, scheme="none"), model.spec), model.spec)
    )
    start = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        found, expected = decoder(tokens, start), plain(tokens, start)
    # Stored in fp16, the plain weights are rounded; the order of inputs would change everything.
    assert torch.allclose(found, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("label", INEXACT)
def test_the_largest_error_is_told_and_needs_leave(label: str, tmp_path: Path) -> None:
    settings, packers, most = INEXACT[label]
    folder, meant = checkpoint(tmp_path / "model", settings, *packers)
    with pytest.raises(UnsupportedError) as refused:
        decoder_values(folder)
    held = decoder_values(folder, replace(CONFIG, allow_inexact=True))
    bits, group = (8, 16) if "8-bit" in label else (4, 32)
    count = 2 if label == "bitnet" else 2**bits - 1
    errors = {
        name: float((abs(held[name] - values) / steps(values, group)).max()) * count
        for name, values in meant.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert 0 < errors[worst] < most
    report = import_report(open_model(folder).checkpoint)
    assert report is not None
    assert report.tensor == worst
    assert report.largest_error == pytest.approx(errors[worst], rel=1e-3)
    assert f"'{worst}' is off by up to {report.largest_error:.2%}" in str(refused.value)
    assert "--allow-inexact" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "settings", "packer"),
    [
        (
            "quantize_config.json",
            {"bits": 4, "group_size": 32, "desc_act": False, "damp_percent": 0.01},
            gptq(4, 32, 1, (1, 16)),
        ),
        (
            "quant_config.json",
            {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"},
            awq(32),
        ),
    ],
)
def test_settings_in_the_file_of_the_tool(
    name: str, settings: dict[str, Any], packer: Packer, tmp_path: Path
) -> None:
    folder, meant = checkpoint(tmp_path / "model", {}, packer)
    with pytest.raises(UnsupportedError, match=r"no quantization_config"):
        decoder_values(folder)
    (folder / name).write_text(json.dumps(settings))
    held = decoder_values(folder)
    for tensor, values in meant.items():
        assert np.array_equal(held[tensor], values), tensor


def test_scales_of_activations_are_left_out_and_told(tmp_path: Path) -> None:
    folder, meant = checkpoint(tmp_path / "model", groups(8, None), plain_bytes)
    tensors = load_file(folder / "model.safetensors")
    for tensor in meant:
        tensors[tensor.replace("weight", "input_scale")] = torch.tensor([0.02])
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.05])
    save_file(tensors, folder / "model.safetensors")
    held = decoder_values(folder)
    for tensor, values in meant.items():
        assert np.array_equal(held[tensor], values), tensor
    activations, cache = sorted(open_model(folder).notes)[::-1]
    assert activations.startswith("7 tensors are left out, which quantize activations")
    assert "k_scale" in cache


def test_settings_that_are_left_over_beside_plain_weights(tmp_path: Path) -> None:
    for method in ("bitsandbytes", "fp8", "aqlm"):
        folder, _ = checkpoint(tmp_path / method, with_method(method, load_in_4bit=True), awq(32))
        model = llama(vocab_size=96, intermediate_size=96).half()
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        held = decoder_values(folder, replace(CONFIG, scheme="none", embedding="none"))
        for tensor, values in model.state_dict().items():
            assert values.ndim == 1 or np.array_equal(held[tensor], values.double().numpy()), tensor
        (note,) = open_model(folder).notes
        assert "no tensor is quantized" in note
        assert import_report(open_model(folder).checkpoint) is None


@pytest.mark.parametrize(
    ("scale", "shape", "settings"),
    [
        ("weight_scale", "all", with_method("fp8", activation_scheme="static")),
        ("weight_scale", "rows", with_method("fbgemm_fp8")),
        ("weight_scale", "all", with_method("modelopt", quant_algo="FP8")),
        ("weight_scale", "all", with_method("modelopt", quantization={"quant_algo": "FP8"})),
        ("weight_scale_inv", "blocks", with_method("fp8", weight_block_size=[40, 24])),
        (
            "weight_scale",
            "rows",
            with_method(
                "compressed-tensors",
                format="float-quantized",
                config_groups={"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            ),
        ),
    ],
)
def test_floats_of_8_bits_are_read_as_values(
    scale: str, shape: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder, meant = checkpoint(tmp_path / "model", settings, fp8(scale, shape))
    stored = open_model(folder).checkpoint
    for name, values in meant.items():
        found = stored.tensor(name, torch.float32).double().numpy()
        assert np.allclose(found, values, rtol=2**-22, atol=0), name
    with pytest.raises(UnsupportedError, match=r"is stored as FP8, .*Give --bits 4"):
        decoder_values(folder)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{scale}"
    tensors[name] = torch.ones(3, 1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{scale} is \[3, 1\] for a matrix \[96, 64\]"):
        open_model(folder).checkpoint.tensor("model.layers.0.mlp.up_proj.weight", torch.float32)


def test_integers_of_bitsandbytes(tmp_path: Path) -> None:
    settings = with_method("bitsandbytes", load_in_8bit=True)
    folder, meant = checkpoint(tmp_path / "model", settings, int8)
    held = decoder_values(folder, replace(CONFIG, allow_inexact=True))
    for name, values in meant.items():
        assert np.abs(held[name] - values).max() < 2**-11 * np.abs(values).max(), name
        stored = open_model(folder).checkpoint.tensor(name, torch.float32).double().numpy()
        assert np.allclose(stored, values, rtol=2**-23, atol=0), name


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_bytes_of_bitsandbytes_seen_as_other_numbers(storage: torch.dtype, tmp_path: Path) -> None:
    settings = with_method("bitsandbytes", load_in_4bit=True)
    folder, meant = checkpoint(tmp_path / "model", settings, nf4(32, True, storage))
    stored = open_model(folder).checkpoint
    for name, values in meant.items():
        found = stored.tensor(name, torch.float32).numpy()
        assert np.array_equal(found, values.astype(np.float32)), name


@pytest.mark.parametrize("nested", [False, True])
def test_tables_of_bitsandbytes(nested: bool, tmp_path: Path) -> None:
    settings = with_method("bitsandbytes", load_in_4bit=True)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    folder, meant = checkpoint(tmp_path / "model", settings, nf4(64, nested), **sizes)
    stored = open_model(folder).checkpoint
    with pytest.raises(UnsupportedError, match=r"bitsandbytes weights .*--allow-inexact"):
        decoder_values(folder)
    held = decoder_values(folder, replace(CONFIG, allow_inexact=True))
    gap = float(np.diff(FLOATS).min())
    errors = {}
    for name, values in meant.items():
        assert np.array_equal(
            stored.tensor(name, torch.float32).numpy(), values.astype(np.float32)
        ), name
        blocks = values.reshape(len(values), -1, 64)
        scale = np.abs(blocks).max(2, keepdims=True)
        off = np.abs(held[name].reshape(blocks.shape) - blocks) / (scale * gap)
        errors[name] = float(off.max())
        assert np.allclose(held[name], values, rtol=2**-10, atol=0), name
    report = import_report(open_model(folder).checkpoint)
    assert report is not None
    # The bound counts every entry of the table in every block, and scales where these are not 1.
    assert 0.5 * max(errors.values()) < report.largest_error < 2**-9 / gap


def test_what_torchao_saved(tmp_path: Path) -> None:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from transformers import TorchAoConfig

    model = llama(vocab_size=96, intermediate_size=96).half()
    kind = IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=MappingType.ASYMMETRIC)
    model.save_pretrained(tmp_path / "plain")
    quantized = type(model).from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(kind), dtype=torch.float16
    )
    quantized.save_pretrained(tmp_path / "model")
    held = decoder_values(tmp_path / "model")
    for name, weight in quantized.state_dict().items():
        if "_proj" in name:
            parts = (weight.qdata, weight.scale, weight.zero_point)
            assert np.array_equal(held[name], affine(*(part.numpy() for part in parts))), name


def test_the_program_holds_every_kind_of_zero_point_and_its_order(tmp_path: Path) -> None:
    kinds = [gptq(4, 32, 1, zeros, seed=3) for zeros in ((8, 8), (1, 15), (1, 16))]
    folder, meant = checkpoint(tmp_path / "model", V1, *kinds)
    bundle = export(folder, output=tmp_path / "bundle", config=CONFIG)
    runner = ReferenceRunner(bundle.folder / "model.pte", Execution(mode="fp32"))
    held = [value.numpy() for _, value in runner.constants() if isinstance(value, torch.Tensor)]
    for name, values in meant.items():
        index = dealt(3, values.shape[1], 32)
        ordered = values[:, np.argsort(index, kind="stable")]
        assert any(np.array_equal(ordered, matrix) for matrix in held), name
    told = bundle.manifest.to_json()["quantization"]
    assert told["import"] == {
        "format": "GPTQ",
        "matrices": 7,
        "exactness": "exact",
        "largest_error": 0.0,
        "tensor": None,
    }
    schemes = {name: entry["scheme"] for name, entry in told["plan"]["matrices"].items()}
    layers = [scheme for name, scheme in schemes.items() if name.startswith("layers.")]
    assert {(scheme["bits"], scheme["group_size"]) for scheme in layers} == {(4, 32)}
    assert {scheme["zero_point"] for scheme in layers} == {"none", "int", "float"}
    assert told["embedding"]["bits"] == 8
    card = (bundle.folder / "README.md").read_text(encoding="utf-8")
    assert "7 matrices as the checkpoint quantized them, GPTQ, exact" in card


@pytest.mark.parametrize(
    ("system", "bits"), [("iOS18", {2: 4, 3: 4, 6: 8}), ("iOS26", {2: 2, 3: 3, 6: 6})]
)
def test_few_bits_are_held_as_such_where_core_ml_can(
    system: str, bits: dict[int, int], tmp_path: Path
) -> None:
    config = replace(CONFIG, minimum_os=system)
    for stored, held in bits.items():
        settings = {"quantization": {"group_size": 32, "bits": stored}}
        folder, _ = checkpoint(tmp_path / str(stored), settings, mlx(stored, 32, whole=True))
        model = open_model(folder)
        assert plan_for(resolve(config, model.spec), model).linear == IntGroup(held, 32)
