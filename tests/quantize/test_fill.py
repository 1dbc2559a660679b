"""Weights arrive one at a time, each read once, and what is wrong with one is said by name."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_coreml.checkpoint import Checkpoint
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.formats.round import quantize_weight
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup, Scheme
from llm_coreml.quantize.quantized import build_decoder, build_original
from tiny import llama, save

CONFIG = ExportConfig(context=32)


def build(folder: Path, config: ExportConfig = CONFIG) -> Any:
    model = open_model(folder)
    job = resolve(config, model.spec)
    return build_decoder(model, job, make_plan(job, model.spec))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(llama(intermediate_size=96), tmp_path / "model")


def edit(folder: Path, name: str, value: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, path)


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_read_once(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    held: list[torch.Tensor] = []
    read = Checkpoint.tensor

    def counted(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
        reads[name] += 1
        result = read(checkpoint, name, dtype)
        if result.dim() == 2:
            held.append(result)
        return result

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    model = open_model(llama(num_hidden_layers=2, intermediate_size=96, tie_word_embeddings=tied))
    assert not reads, "opening reads no data"
    job = resolve(CONFIG, model.spec)
    decoder = build_decoder(model, job, make_plan(job, model.spec))
    assert set(reads) == {
        name for made in model.family.stored(model.spec).values() for name in made.names
    }
    assert set(reads.values()) == {1}
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == tied
    kept = {p.untyped_storage().data_ptr() for p in decoder.parameters() if type(p) is torch.Tensor}
    assert not kept & {matrix.untyped_storage().data_ptr() for matrix in held}


def test_a_tied_head_in_a_format_of_its_own_reads_the_table_again() -> None:
    config = ExportConfig(context=32, lm_head="int4-channel")
    model = open_model(llama(intermediate_size=96, tie_word_embeddings=True))
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, make_plan(job, model.spec))
    table, head = decoder.embed_tokens.weight, decoder.lm_head.weight
    assert table is not head
    distance = (table.dequantize() - head.dequantize()).abs().max()
    assert 0 < distance < 0.1, "two roundings of the same values"


def test_progress_ends_at_one_and_never_falls(folder: Path) -> None:
    model = open_model(folder)
    shares: list[float] = []
    job = resolve(CONFIG, model.spec)
    build_decoder(model, job, make_plan(job, model.spec), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0 and shares[0] > 0


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_named(folder: Path, name: str, value: float) -> None:
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[5] = value
    edit(folder, name, tensor)
    with pytest.raises(CheckpointError) as caught:
        build(folder)
    assert f"'{name}'" in str(caught.value)
    assert f"is {value}" in str(caught.value)


def test_a_weight_beyond_fp16_is_named_and_fp32_takes_it(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    tensor[3, 4] = 1e5
    edit(folder, name, tensor)
    with pytest.raises(CheckpointError, match=r"up_proj.weight' in .* is 100000 at \[3, 4\]"):
        build(folder)
    plain = ExportConfig(context=32, scheme="none", embedding="none", compute_precision="fp32")
    assert build(folder, plain).layers[0].mlp.up_proj.weight[3, 4] == 1e5
    tables = replace(plain, scheme="codebook", bits=4)
    with pytest.raises(UnsupportedError, match=rf"'{name}' in .*: a value is 100000; .* fp16"):
        build(folder, tables)


def test_missing_surplus_and_misshapen_tensors_are_named_when_opened(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.ones(95, 64)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        open_model(folder)
    message = str(caught.value)
    assert "1 missing: 'model.norm.weight'" in message
    assert "1 surplus: 'model.layers.0.self_attn.q_norm.weight'" in message
    assert "1 misshapen: 'model.layers.0.mlp.gate_proj.weight' in" in message
    assert "is [95, 64], not [96, 64]" in message


def test_bias_switches_are_held_against_the_tensors(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 surplus: '{name}'"):
        open_model(folder)


def test_what_old_checkpoints_carry_along_is_ignored(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    build_original(open_model(folder), 32)


# Quantizing one matrix


def dense(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_weight(module, scheme)
    found: torch.Tensor = module.weight.dequantize()
    return found


def uneven_rows() -> torch.Tensor:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    return weight * torch.logspace(-2, 1, 16).unsqueeze(1)


def test_int8_lies_within_half_a_step_of_its_row() -> None:
    weight = uneven_rows()
    # The largest value may lie half a step past the last code; fp16 then rounds the step itself.
    step = weight.abs().amax(-1) / 127.5
    found = dense(weight, IntChannel(8))
    assert ((found - weight).abs().amax(-1) <= (0.51 + 2**-4) * step).all()
    assert (found != 0).any(dim=-1).all(), "small rows keep scales of their own"


@pytest.mark.parametrize(
    ("scheme", "size"), [(IntGroup(4, 8), 8), (IntChannel(4), 64)], ids=["group", "channel"]
)
def test_int4_loses_less_than_a_scale_for_the_largest_weight(scheme: Scheme, size: int) -> None:
    weight = uneven_rows()
    grouped = weight.view(16, -1, size)
    step = grouped.abs().amax(-1, keepdim=True) / 7.5
    plain = ((grouped / step).round().clamp(-8, 7) * step).view(16, 64)
    found = dense(weight, scheme)
    errors, lost = ((values - weight).square().sum(-1) for values in (found, plain))
    assert (errors < lost).all()
    assert float((errors / lost).mean()) < 0.9
    assert (found != 0).any(dim=-1).all(), "small rows keep scales of their own"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_codebooks_hold_few_values_per_table(bits: int) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    found = dense(weight, Codebook(bits, 16))
    for table in range(2):
        rows = slice(16 * table, 16 * table + 16)
        assert len(set(found[rows].flatten().tolist())) <= 2**bits
    assert float((found - weight).square().mean()) < 1.3 * 4.0**-bits * 2


def test_more_bits_are_nearer() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    errors = [
        float((dense(weight, Codebook(bits, 16)) - weight).square().mean())
        for bits in (1, 2, 3, 4, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    "scheme",
    [IntGroup(4, 32), IntChannel(8), Codebook(4, 16)],
    ids=["int4-group", "int8-channel", "codebook"],
)
def test_a_matrix_of_zeros_stays_zero(scheme: Scheme) -> None:
    found = dense(torch.zeros(32, 64), scheme)
    assert torch.equal(found, torch.zeros(32, 64))


@pytest.mark.parametrize(
    ("scheme", "attribute"),
    [(IntGroup(4, 8), "scale"), (IntChannel(8), "scale"), (Codebook(2, 16), "codebook")],
    ids=["int4-group", "int8-channel", "codebook"],
)
def test_scales_and_tables_are_rounded_to_fp16(scheme: Scheme, attribute: str) -> None:
    module = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    quantize_weight(module, scheme)
    values = getattr(module.weight, attribute)
    assert torch.equal(values, values.half().to(values.dtype))
