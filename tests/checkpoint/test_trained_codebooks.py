"""Models that were trained with codebooks: what is exported is what was trained, bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchao.quantization import quantize_
from torchao.quantization.qat.linear import enable_linear_fake_quant
from transformers import AutoModelForCausalLM

import llm_coreml
from llm_coreml.checkpoint.matrix import Levels, Packed
from llm_coreml.checkpoint.value_maps import Interleaved, Rows
from llm_coreml.codebook_qat import CodebookFakeQuantizer
from llm_coreml.errors import CheckpointError, ConfigError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.qat import QatConfig, qat_config
from llm_coreml.quantize.formats.schemes import Codebook
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.training.handover import hand_over
from tiny import expected_logits, llama, save, tokens_for
from warned import OF_PEFT

pytestmark = OF_PEFT

TOKENS = tokens_for(97, 24)
TABLES = "model.layers.0.self_attn.q_proj.weight_fake_quantizer.tables"


def trained(qat: QatConfig, steps: int = 3) -> Any:
    """Take a few steps with entries of tables for weights."""
    model = llama(intermediate_size=96)
    quantize_(model, qat.prepare, qat.filter)
    model.train()
    step = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([TOKENS])
    for _ in range(steps):
        step.zero_grad()
        model(ids, labels=ids).loss.backward()
        step.step()
    return model.eval()


def quantizers(model: Any) -> dict[str, tuple[CodebookFakeQuantizer, torch.Tensor]]:
    """Return the quantizers by the decoder's name of the weight, and the weights."""
    return {
        f"{name.removeprefix('model.')}.weight": (module.weight_fake_quantizer, module.weight)
        for name, module in model.named_modules()
        if hasattr(module, "weight_fake_quantizer")
    }


@pytest.mark.parametrize("scheme", ["codebook:3", "codebook:2:columns32", "codebook:1:whole"])
def test_what_was_trained_is_read_bit_by_bit(scheme: str, tmp_path: Path) -> None:
    qat = qat_config(scheme)
    live = trained(qat)
    before = copy.deepcopy(live.state_dict())
    opened = open_model(live)
    forms = opened.weights.forms()
    assert len(forms) == 7 and all(form.error == 0 for form in forms.values())
    for name, (quantizer, weight) in quantizers(live).items():
        rounded = quantizer(weight)
        assert not torch.equal(rounded, weight)
        assert torch.equal(opened.weights.tensor(name, torch.float32), rounded), name
    wanted = expected_logits(live, TOKENS)
    found = EagerRunner(build_original(opened, 64), "eager").logits(TOKENS)
    assert (found - wanted).abs().max() < 1e-4
    assert all(torch.equal(before[name], each) for name, each in live.state_dict().items())
    # Saved it is the same checkpoint, by transformers or for the process that exports.
    assert open_model(save(live, tmp_path / "saved")).sha256() == opened.sha256()
    assert open_model(hand_over(live, None, tmp_path, 1)).sha256() == opened.sha256()
    # Converted, it says the same to whoever knows nothing of tables, and trains on as it is.
    quantize_(live, qat.convert, qat.filter)
    assert (expected_logits(live, TOKENS) - wanted).abs().max() == 0
    plain = AutoModelForCausalLM.from_pretrained(save(live, tmp_path / "converted"))
    assert (expected_logits(plain, TOKENS) - wanted).abs().max() < 1e-4
    for quantizer, weight in quantizers(live).values():
        tables = quantizer.tables.clone()
        quantizer.refresh(weight)
        assert torch.equal(quantizer.tables, tables)


def test_the_program_holds_the_trained_tables(tmp_path: Path) -> None:
    live = trained(qat_config("codebook:2"))
    settings = llm_coreml.ExportConfig(context=64, seq_lengths=(1,), embedding="none", target="ane")
    made = llm_coreml.export(live, output=tmp_path / "out", config=settings, cache=False)
    stored = made.manifest.quantization
    assert stored.imported is not None
    assert (stored.imported.matrices, stored.imported.exactness) == (7, "exact")
    wanted = expected_logits(live, TOKENS)[-1]
    found = llm_coreml.load(made.folder).logits(TOKENS)[-1]
    assert (found - wanted).abs().max() < 2e-2 * wanted.abs().max()


def test_gradients_pass_and_tables_follow_the_weights() -> None:
    weight = torch.nn.Parameter(torch.randn(32, 24, generator=torch.Generator().manual_seed(0)))
    quantizer = CodebookFakeQuantizer(Codebook(bits=2, rows=16), weight)
    first = quantizer.tables.clone()
    pull = torch.randn(32, 24)
    rounded = quantizer(weight)
    (rounded * pull).sum().backward()
    # Straight through; without a change of the weight no other tables.
    assert weight.grad is not None and torch.equal(weight.grad, pull)
    assert torch.equal(quantizer.tables, first) and torch.equal(quantizer(weight), rounded)
    for block in (slice(0, 16), slice(16, 32)):
        values, entries = weight[block].detach().flatten(), rounded[block].unique()
        assert len(entries) == 4
        off = (values[:, None] - entries).abs()
        assert torch.equal((values - rounded[block].detach().flatten()).abs(), off.amin(1))
    with torch.no_grad():
        weight.add_(0.3)
    # Not in evaluation, for what is measured is what is exported.
    quantizer.eval()
    quantizer(weight)
    assert torch.equal(quantizer.tables, first)
    quantizer.train()
    quantizer(weight)
    for group, block in enumerate((slice(0, 16), slice(16, 32))):
        values, entries = weight[block].detach().flatten(), first[group, 0].float()
        codes = (values[:, None] - entries).abs().argmin(1)
        means = torch.stack([values[codes == code].mean() for code in range(4)])
        assert (quantizer.tables[group, 0] - means).abs().max() < 2e-3
        assert (means - entries).abs().max() > 0.01
    # An entry without weights stays where it is.
    lone = torch.nn.Parameter(torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    quantizer = CodebookFakeQuantizer(Codebook(bits=1, rows=None), lone)
    with torch.no_grad():
        lone.fill_(0.25)
    quantizer(lone)
    assert quantizer.tables.flatten().tolist() == [0.25, 1.0]


def test_rows_of_a_matrix_take_their_tables_along() -> None:
    tables = torch.arange(16.0).view(4, 1, 4)
    ones, flat = torch.ones(64, 1), torch.zeros(64, 1, dtype=torch.bool)
    codes = torch.randint(4, (64, 8), dtype=torch.int8)
    stored = Packed(codes, Levels(2, ones, None, flat, 0.0, tables))
    found = Rows(16, 48, of=64).packed(stored)
    assert torch.equal(found.codes, codes[16:48]) and found.levels.tables is not None
    assert torch.equal(found.levels.tables, tables[1:3])
    for cut in (Rows(8, 40, of=64), Rows(0, 8, of=64), Interleaved(heads=2, dim=32)):
        with pytest.raises(UnsupportedError, match=r"Tables of 16 rows .*codebook:BITS:whole"):
            cut.packed(stored)
    whole = Packed(codes, Levels(2, ones, None, flat, 0.0, tables[:1]))
    assert Interleaved(heads=2, dim=32).packed(whole).levels.tables is not None


def test_what_is_switched_off_is_exported_as_it_computes() -> None:
    live = trained(qat_config("codebook:2"), steps=1)
    live.apply(lambda module: enable_linear_fake_quant(module, enabled=False))
    opened = open_model(live)
    assert not opened.weights.forms()
    name, (_, weight) = next(iter(quantizers(live).items()))
    assert torch.equal(opened.weights.tensor(name, torch.float32), weight)


def test_an_adapter_over_tables_is_refused() -> None:
    live = llama(intermediate_size=96)
    quantize_(live, qat_config("codebook:2").prepare, qat_config("codebook:2").filter)
    live = peft.get_peft_model(live, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight' is rounded in training and has"):
        open_model(live)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tables: tables * float("nan"), "its tables have values that are not finite"),
        (lambda tables: tables.flip(2), "its tables are not ascending"),
        (lambda tables: tables[:, :, :3], "its tables have 3 entries, not 2, 4"),
        (lambda tables: tables.repeat(2, 1, 1)[:3], "its 64 rows do not divide into 3 blocks"),
        (lambda tables: tables.flatten(), "no 3-dimensional array"),
        (lambda tables: tables.to(torch.int8), "is int8, not"),
        (lambda tables: tables.float() * 1e9, "a table's value is .*which fp16 cannot hold"),
    ],
)
def test_damaged_tables_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], told: str, saved: Path, tmp_path: Path
) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors[TABLES] = change(tensors[TABLES]).contiguous()
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"q_proj'.*{told}"):
        open_model(tmp_path).weights.forms()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of a model that was prepared."""
    return save(trained(qat_config("codebook:2"), steps=0), tmp_path_factory.mktemp("saved"))


def test_weights_that_training_has_spoilt_are_refused() -> None:
    live = trained(qat_config("codebook:2"), steps=0)
    with torch.no_grad():
        live.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"q_proj'.*weight has values that are not finite"):
        open_model(live).weights.packed("layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("codebook", "1, 2, 3, 4, 6 or 8 bits, as codebook:3"),
        ("codebook:5", "'codebook:5'; a codebook has 1, 2"),
        ("codebook:3:vector2", "leave out vectorN and scaled"),
        ("codebook:3:scaled", "leave out vectorN and scaled"),
        ("codebook:3:rosw8", "rosw8.* which is no option of a format"),
        ("codebok:3", "not .codebok:3.*codebook"),
    ],
)
def test_configurations_that_are_none(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        qat_config(text)


def test_layers_that_cannot_be_trained_so_are_refused() -> None:
    qat = qat_config("codebook:2:rows24")
    with pytest.raises(UnsupportedError, match="has 64 rows, which --codebook-rows 24 does not"):
        quantize_(llama(), qat.prepare, qat.filter)
    qat = qat_config("codebook:2")
    with pytest.raises(UnsupportedError, match="plain weights in memory, and a linear layer has"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(32, 32, device="meta")), qat.prepare)
