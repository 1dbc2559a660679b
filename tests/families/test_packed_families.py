"""Quantized checkpoints of every family: fused and rearranged matrices keep codes, or say no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cases import cases
from family_table import TABLE, checkpoint
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import known_model_types
from llm_coreml.model import Model, open_model
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.plan.choose import plan_for
from llm_coreml.quantize.plan.plan import matrices
from llm_coreml.quantize.quantized import build_decoder
from packers import Packer, awq, compressed, gptq, mlx, nf4

GROUP = 16


def with_method(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **settings}}


_WEIGHTS = {"num_bits": 4, "type": "int", "group_size": GROUP}
FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "gptq": (with_method("gptq", bits=4, group_size=GROUP), gptq(4, GROUP, 1, (1, 15))),
    "awq": (with_method("awq", bits=4, group_size=GROUP), awq(GROUP)),
    "compressed-tensors": (
        with_method("compressed-tensors", config_groups={"group_0": {"weights": _WEIGHTS}}),
        compressed(4, GROUP, False),
    ),
    "bitsandbytes": (with_method("bitsandbytes", load_in_4bit=True), nf4(GROUP, False)),
    "mlx": ({"quantization": {"group_size": GROUP, "bits": 4}}, mlx(4, GROUP, whole=True)),
}
# A matrix that is stored [in, out] has its groups along the wrong side.
REFUSED = {"gpt-sw3", "gpt2", "openai-gpt"}
# One of plain matrices, one of fused ones, one of rows in another order.
SHOWN = {"llama", "phi3", "ernie4_5"}
FAMILIES = cases(known_model_types(), set(known_model_types()) - SHOWN)


def packed(folder: Path, family: str, label: str) -> dict[str, torch.Tensor]:
    """Write a family's model with packed matrices; return their values by stored names."""
    settings, packer = FORMATS[label]
    checkpoint(folder, family, next(iter(TABLE[family].cases.values())))
    model = open_model(folder)
    stored = model.family.stored(model.spec)
    names = {name for ours, _ in matrices(model.spec) for name in stored[f"{ours}.weight"].names}
    tensors = load_file(folder / "model.safetensors")
    rng, meant = np.random.default_rng(7), {}
    for name in sorted(names):
        rows, columns = tensors.pop(name).shape
        parts, values = packer(rng, rows, columns)
        meant[name] = torch.from_numpy(values)
        module = name.removesuffix("weight")
        tensors |= {module + suffix: part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return meant


def values_of(model: Model) -> dict[str, torch.Tensor]:
    """Return every matrix of the decoder that an export would hold."""
    config = ExportConfig(context=32, seq_lengths=(1, 8), allow_inexact=True)
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, plan_for(job, model))
    return {
        name: torch.cat(list(dense_rows(parameter))).double()
        for name, parameter in decoder.named_parameters()
        if parameter.ndim == 2
    }


@pytest.mark.parametrize("label", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_are_kept(family: str, label: str, tmp_path: Path) -> None:
    meant = packed(tmp_path, family, label)
    model = open_model(tmp_path)
    if family in REFUSED:
        with pytest.raises(UnsupportedError, match=r"rearranges it, which cannot be imported"):
            values_of(model)
        return
    stored, found = model.family.stored(model.spec), values_of(model)
    bound = 0.0 if label != "bitsandbytes" else 2**-10
    for name, _ in matrices(model.spec):
        made = stored[f"{name}.weight"]
        values = meant[made.names[0]]
        wanted = values if made.values is None else made.values.values([values])
        error = (found[f"{name}.weight"] - wanted).abs().max()
        assert error <= bound * wanted.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_quantized_again_where_bits_are_asked_for(family: str, tmp_path: Path) -> None:
    meant = packed(tmp_path, family, "awq")
    model = open_model(tmp_path).expanded()
    stored = model.family.stored(model.spec)
    for name, _ in matrices(model.spec):
        made = stored[f"{name}.weight"]
        values = meant[made.names[0]]
        wanted = values if made.values is None else made.values.values([values])
        found = model.weights.tensor(f"{name}.weight", torch.float32)
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=0), name


def test_biases_of_zeros_that_a_family_has_are_no_padding(tmp_path: Path) -> None:
    packed(tmp_path, "qwen2", "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    biases = {name: torch.zeros_like(each) for name, each in tensors.items() if ".bias" in name}
    # Some packers write one beside every matrix.
    for name in [each for each in tensors if each.endswith(".o_proj.qweight")]:
        biases[name.replace("qweight", "bias")] = torch.zeros(64)
    save_file({**tensors, **biases}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (note,) = open_model(tmp_path).notes
    assert "2 tensors are left out, biases that are zero" in note
