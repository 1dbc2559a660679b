"""Quantized checkpoints that are damaged, cannot be held, or are asked to be quantized again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import CheckpointError, ConfigError, LlmCoreMLError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.progress import Silent
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.formats.schemes import IntChannel, Unquantized
from llm_coreml.quantize.plan.choose import plan_for
from llm_coreml.quantize.plan.imported import import_report
from llm_coreml.quantize.quantized import Quantized, build_decoder, quantize
from packers import awq, bitnet, checkpoint, compressed, gptq, hqq, mlx, mxfp4, nf4

CONFIG = ExportConfig(context=32)
UP = "model.layers.0.mlp.up_proj"
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
WEIGHTS = {"num_bits": 4, "type": "int", "group_size": 16}
COMPRESSED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": WEIGHTS}},
    }
}
BITNET = {"quantization_config": {"quant_method": "bitnet"}}
TERNARY = {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}
HQQ = {"quantization_config": {"quant_method": "hqq"}}
NF4 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
SETTINGS = "quant_state.bitsandbytes__nf4"
CROSSING = torch.tensor([*b'{"shape": [96, 64], "blocksize": 48}'], dtype=torch.uint8)
MLX = {"quantization": {"group_size": 32, "bits": 4}}
Change = Callable[[dict[str, torch.Tensor]], None]


def put(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def changed(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.{suffix}"] = change(tensors[f"{UP}.{suffix}"]).contiguous()

    return changed


def drop(suffix: str) -> Change:
    def changed(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{UP}.{suffix}"]

    return changed


def entry(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that sets the first entry."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return changed


def edit(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def build(folder: Path, config: ExportConfig = CONFIG) -> Any:
    model = open_model(folder)
    job = resolve(config, model.spec)
    return build_decoder(model, job, plan_for(job, model))


BAD: list[tuple[dict[str, Any], Any, Change, type[LlmCoreMLError], str]] = [
    (GPTQ, gptq(4, 32, 1, (8, 8)), drop("qzeros"), CheckpointError, r"missing: '.*up_proj.weight'"),
    (
        GPTQ,
        gptq(4, 32, 1, (8, 8)),
        put("qzeros", lambda t: t[:, 1:]),
        CheckpointError,
        r"up_proj' in '.*': qzeros is \[2, 11\], not \[2, 12\]. Download the checkpoint again",
    ),
    (
        GPTQ,
        gptq(4, 32, 1, (8, 8)),
        put("qweight", lambda t: t[:5]),
        CheckpointError,
        r"misshapen: '.*up_proj.weight' in model.safetensors is \[96, 40\], not \[96, 64\]",
    ),
    (
        GPTQ,
        gptq(4, 32, 1, (8, 8)),
        put("qweight", lambda t: t.to(torch.int64)),
        CheckpointError,
        r"qweight is int64, not int32",
    ),
    (
        GPTQ,
        gptq(4, 32, 1, (8, 8)),
        put("g_idx", entry(2)),
        CheckpointError,
        r"g_idx names group 2, and there are 2, from 0 on",
    ),
    (
        GPTQ,
        gptq(4, 32, 1, (8, 8)),
        put("g_idx", entry(1)),
        CheckpointError,
        r"g_idx gives its groups different numbers of inputs",
    ),
    (
        GPTQ,
        gptq(4, 32, 1, (8, 8)),
        put("g_idx", lambda t: t.flip(0)),
        UnsupportedError,
        r"mlp.up_proj has its inputs in another order than gate_proj.*desc_act=False",
    ),
    (
        GPTQ,
        gptq(4, 32, 1, (8, 8)),
        put("scales", entry(float("nan"))),
        CheckpointError,
        r"a scale is nan, which fp16 cannot hold",
    ),
    (
        AWQ,
        awq(32),
        put("scales", lambda t: t.to(torch.float32) * 1e8),
        CheckpointError,
        r"a scale is .*e\+0., which fp16 cannot hold",
    ),
    (AWQ, awq(32), put("qzeros", lambda t: t[:1]), CheckpointError, r"qzeros is \[1, 12\], not"),
    (
        COMPRESSED,
        compressed(4, 32, True),
        lambda _: None,
        CheckpointError,
        r"weight_scale has 3 groups for 96 inputs, which is no group size of config.json",
    ),
    (
        COMPRESSED,
        compressed(4, 16, True),
        put("weight_shape", entry(97)),
        CheckpointError,
        r"weight_packed is \[96, 8\] for a matrix \[97, 64\]",
    ),
    (
        COMPRESSED,
        compressed(4, 16, True),
        lambda tensors: tensors.update({f"{UP}.weight_g_idx": torch.arange(64).flip(0) // 16}),
        UnsupportedError,
        r"up_proj has its inputs in another order than gate_proj",
    ),
    (TERNARY, bitnet(False), put("weight", entry(255)), CheckpointError, r"weight has a code of 3"),
    (BITNET, bitnet(True), put("weight_scale", entry(0)), CheckpointError, r"weight_scale is 0"),
    (
        TERNARY,
        bitnet(False),
        put("weight_scale", lambda t: torch.full((1,), 1e-9)),
        CheckpointError,
        r"makes all of it 1e-09, which fp16 holds as 0",
    ),
    (
        {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}},
        bitnet(True),
        lambda _: None,
        UnsupportedError,
        r"rounds each time \(quantization_mode 'online'\)",
    ),
    (HQQ, hqq(4, 32, (8, 8)), put("axis", entry(0)), UnsupportedError, r"groups along axis 0"),
    (HQQ, hqq(4, 32, (8, 8)), put("nbits", entry(3)), UnsupportedError, r"codes of 3 bits"),
    (HQQ, hqq(4, 32, (8, 8)), put("W_q", lambda t: t[1:]), CheckpointError, r"W_q is \[95, 32\]"),
    (HQQ, hqq(4, 32, (8, 8)), put("shape", entry(-96)), CheckpointError, r"shape is \[-96, 64\]"),
    (
        NF4,
        nf4(32, False),
        put(f"weight.{SETTINGS}", entry(0)),
        CheckpointError,
        r"up_proj' in '.*': its settings are no JSON",
    ),
    (
        NF4,
        nf4(32, False),
        put(f"weight.{SETTINGS}", lambda _: CROSSING),
        UnsupportedError,
        r"up_proj' has 64 inputs, so that bitsandbytes' blocks of 48 go beyond a row",
    ),
    (
        NF4,
        nf4(32, True),
        put("weight.nested_absmax", lambda t: torch.cat([t, t])),
        CheckpointError,
        r"weight.nested_absmax is \[2\], not \[1\]",
    ),
    (
        {
            "quantization_config": {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": 32,
                "dynamic": {"a": {}},
            }
        },
        gptq(4, 32, 1, (8, 8)),
        put("qzeros", lambda t: t[:, 1:]),
        CheckpointError,
        r"qzeros has 11 words for 96 outputs, which is none of 2, 3, 4, 8 bits for each",
    ),
    (MLX, mlx(4, 32, True), put("biases", lambda t: t[:, :1]), CheckpointError, r"biases is"),
    (
        {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
        mxfp4(True),
        put("scales", lambda t: t + 50),
        CheckpointError,
        r"a scale is .*, which fp16 cannot hold",
    ),
]


@pytest.mark.parametrize(
    ("settings", "packer", "change", "kind", "message"),
    [pytest.param(*row, id=f"{index}-{row[4][:25]}") for index, row in enumerate(BAD)],
)
def test_damage_is_told_by_the_matrix(
    settings: dict[str, Any],
    packer: Any,
    change: Change,
    kind: type[LlmCoreMLError],
    message: str,
    tmp_path: Path,
) -> None:
    folder, _ = checkpoint(tmp_path / "model", settings, packer)
    edit(folder, change)
    with pytest.raises(kind, match=message):
        build(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 5, "group_size": 32},
            "bits = 5 .* 2, 3, 4, 8 can be",
        ),
        ({"quant_method": "gptq", "bits": 4}, "group_size = None"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 40},
            "its 96 inputs do not divide",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            "'m",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:marlin"}, "form 'marlin'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt weights of NVFP4"),
        ({"quant_method": "compressed-tensors"}, "names no config_groups"),
        ({"quant_method": "torchao", "quant_type": {"_type": "Int4Config"}}, "of Int4Config"),
        (
            {"quant_method": "aqlm"},
            "has quantization_config aqlm, which cannot be read. Read are auto-round, awq",
        ),
        ({"bits": 4, "group_size": 32, "mode": "nvfp4"}, "MLX weights in the mode 'nvfp4'"),
        (
            {"bits": 4, "group_size": 32, "mode": "mxfp4", "lm_head": {"bits": 8}},
            "of mode 'mxfp4' with other settings for modules",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "weights are nvfp4-pack-quantized, not integers, FP8 or MXFP4",
        ),
        (["gptq"], "must be an object"),
    ],
)
def test_settings_that_cannot_be_read(settings: Any, message: str, tmp_path: Path) -> None:
    packer = gptq(4, 32, 1, (8, 8))
    folder, _ = checkpoint(tmp_path / "model", {"quantization_config": settings}, packer)
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        build(folder)


class Told(Silent):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("packer", "settings"), [(gptq(4, 32, 1, (8, 8)), GPTQ), (nf4(32, True), NF4)]
)
def test_values_are_quantized_again_where_codes_are_asked_for(
    packer: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder, meant = checkpoint(tmp_path / "model", settings, packer)
    plain, _ = checkpoint(tmp_path / "plain", {}, lambda *sizes: packer(*sizes))
    tensors = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "_proj" not in name
    }
    values = {name: torch.from_numpy(value).float() for name, value in meant.items()}
    save_file({**tensors, **values}, plain / "model.safetensors")
    for choice in ({"bits": 8}, {"scheme": "none"}, {"bits": 3}, {"rotate": "both"}):
        config = replace(CONFIG, **choice)
        told = Told()
        found = requantized(folder, config, told)
        expected = requantized(plain, config, Told())
        assert "expanded and treated as any others" in told.notes[0]
        wanted = dict(expected.decoder.named_parameters())
        for name, parameter in found.decoder.named_parameters():
            rows, others = dense_rows(parameter), dense_rows(wanted[name])
            assert torch.equal(torch.cat(list(rows)), torch.cat(list(others))), (choice, name)
        assert import_report(found.model.checkpoint) is None
        assert found.model.sha256() == open_model(folder).sha256()


def requantized(folder: Path, config: ExportConfig, progress: Silent) -> Quantized:
    model = open_model(folder)
    return quantize(model, resolve(config, model.spec), folder / "tokenizer.json", progress)


@pytest.mark.parametrize("choice", [{"scheme": "none"}, {"bits": 16}], ids=str)
def test_values_of_a_quantized_checkpoint_are_left_as_they_are_where_that_is_asked_for(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = checkpoint(tmp_path / "model", MLX, mlx(4, 32, True), tables=True)
    plan = requantized(folder, replace(CONFIG, **choice), Silent()).plan
    schemes = {plan.linear, plan.embedding, plan.lm_head, *plan.exceptions.values()}
    assert schemes == {Unquantized(16)}


def test_tables_that_an_import_left_unquantized_are_stored_as_usual(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", GPTQ, gptq(4, 32, 1, (8, 8)))
    plan = requantized(folder, CONFIG, Silent()).plan
    assert (plan.embedding, plan.lm_head) == (IntChannel(8), IntChannel(8))


def test_tables_that_are_quantized_keep_their_format(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", MLX, mlx(4, 32, True), tables=True)
    with pytest.raises(ConfigError, match=r"--embedding none .*\(MLX, 4 bit\)"):
        build(folder, replace(CONFIG, embedding="none"))
    with pytest.raises(ConfigError, match=r"--lm-head none .*\(MLX, 4 bit\)"):
        build(folder, replace(CONFIG, lm_head="none"))


def test_the_neural_engine_refuses_groups_that_are_imported_too(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", GPTQ, gptq(4, 32, 1, (8, 8)))
    with pytest.raises(UnsupportedError, match=r"holds .* as int4 group 32, and --target ane"):
        build(folder, replace(CONFIG, target="ane"))
    build(folder, replace(CONFIG, target="ane", force=True))


def test_what_the_checkpoint_left_unquantized_stays_so(tmp_path: Path) -> None:
    folder, meant = checkpoint(tmp_path / "model", GPTQ, gptq(4, 32, 1, (8, 8)))
    values = torch.from_numpy(meant[f"{UP}.weight"]).half()

    def plain(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{UP}.{suffix}")
        tensors[f"{UP}.weight"] = values

    edit(folder, plain)
    model = open_model(folder)
    job = resolve(CONFIG, model.spec)
    plan = plan_for(job, model)
    assert dict(plan.exceptions) == {"layers.0.mlp.up_proj": Unquantized()}
    assert torch.equal(build(folder).layers[0].mlp.up_proj.weight, values)


def test_a_bias_of_zeros_is_the_packers_own(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", GPTQ, gptq(4, 32, 1, (8, 8)))
    edit(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.zeros(96).half()}))
    build(folder)
    edit(folder, lambda tensors: tensors.update({f"{UP}.bias": torch.ones(96).half()}))
    with pytest.raises(CheckpointError, match=r"1 surplus: '.*up_proj.bias'"):
        build(folder)


def test_the_hash_is_that_of_what_is_stored(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", GPTQ, gptq(4, 32, 1, (8, 8)))
    before = open_model(folder).sha256()
    assert open_model(folder).sha256() == before
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        again, _ = checkpoint(tmp_path / suffix, GPTQ, gptq(4, 32, 1, (8, 8)))
        edit(again, put(suffix, entry(0)))
        assert (open_model(again).sha256() == before) == (suffix == "g_idx"), suffix


def test_codes_of_one_byte_are_not_taken_for_four_bits(tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 32}}
    folder, meant = checkpoint(tmp_path / "model", settings, gptq(4, 32, 1, (8, 8)))
    with pytest.raises(CheckpointError, match="misshapen"):
        build(folder)
    assert np.isfinite(meant[f"{UP}.weight"]).all()
