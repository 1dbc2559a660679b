"""Models that were trained with torchao's rounding: what is exported is what was trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import llm_coreml
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.qat import QatConfig, qat_config
from llm_coreml.quantize.quantized import build_original
from llm_coreml.runtime.eager import EagerRunner
from tiny import expected_logits, llama, tokens_for
from warned import OF_PEFT

pytestmark = OF_PEFT

TOKENS = tokens_for(97, 24)


def trained(qat: QatConfig, **changes: Any) -> Any:
    """Take a few steps with rounded weights."""
    model = llama(intermediate_size=96, **changes)
    quantize_(model, qat.prepare, qat.filter)
    model.train()
    step = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.tensor([TOKENS])
    for _ in range(3):
        step.zero_grad()
        model(ids, labels=ids).loss.backward()
        step.step()
    return model.eval()


def logits_of(source: Any) -> torch.Tensor:
    return EagerRunner(build_original(open_model(source), 64), "eager").logits(TOKENS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["int4-group", "int8-group", "int4-channel", "int8-channel"])
def test_what_was_trained_is_read_bit_by_bit(scheme: str, tied: bool) -> None:
    qat = qat_config(scheme)
    live = trained(qat, tie_word_embeddings=tied)
    before = copy.deepcopy(live.state_dict())
    opened = open_model(live)
    forms = opened.weights.forms()
    assert len(forms) == 7 and all(form.error == 0 for form in forms.values())
    for name, module in live.named_modules():
        if hasattr(module, "weight_fake_quantizer"):
            rounded = copy.deepcopy(module.weight_fake_quantizer)(module.weight)
            own = f"{name.removeprefix('model.')}.weight"
            assert torch.equal(opened.weights.tensor(own, torch.float32), rounded), own
            assert module.weight_fake_quantizer.__dict__.keys() == (
                copy.deepcopy(module.weight_fake_quantizer).__dict__.keys()
            )
    wanted = expected_logits(live, TOKENS)
    assert (logits_of(live) - wanted).abs().max() < 1e-4
    after = live.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # Converted, it is the same checkpoint.
    converted = copy.deepcopy(live)
    quantize_(converted, qat.convert, qat.filter)
    again = open_model(converted)
    assert again.sha256() == opened.sha256()
    assert (logits_of(converted) - wanted).abs().max() < 1e-4


def test_the_program_holds_the_trained_codes(tmp_path: Path) -> None:
    live = trained(qat_config("int4-group", group_size=32))
    settings = llm_coreml.ExportConfig(context=64, seq_lengths=(1,), embedding="none")
    made = llm_coreml.export(live, output=tmp_path / "out", config=settings, cache=False)
    imported = made.manifest.quantization.imported
    assert imported is not None and (imported.matrices, imported.exactness) == (7, "exact")
    assert made.manifest.verification.conversion is not None
    wanted = expected_logits(live, TOKENS)[-1]
    found = llm_coreml.load(made.folder).logits(TOKENS)[-1]
    assert (found - wanted).abs().max() < 2e-2 * wanted.abs().max()


def test_rounding_that_is_not_the_formats_is_refused_or_told() -> None:
    # Scales of fp32, which fp16 does not hold: imported as near as can be, and said so.
    live = llama(intermediate_size=96)
    fake = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    quantize_(live, QATConfig(weight_config=fake, step="prepare"), qat_config("int4-group").filter)
    forms = open_model(live).weights.forms()
    assert all(0 < form.error < 0.01 for form in forms.values())
    # What learns its ranges has scales of its own.
    live = trained(qat_config("int4-group"))
    for module in live.modules():
        if hasattr(module, "weight_fake_quantizer"):
            module.weight_fake_quantizer.register_forward_hook(lambda *given: given[2] * 2)
    with pytest.raises(UnsupportedError, match=r"rounding that cannot be taken as codes.*qat_conf"):
        open_model(live)


def test_an_adapter_over_rounded_weights_is_refused() -> None:
    live = llama(intermediate_size=96)
    quantize_(live, qat_config("int4-group").prepare, qat_config("int4-group").filter)
    live = peft.get_peft_model(live, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight' is rounded in training and has"):
        open_model(live)


def test_inputs_that_were_rounded_are_told() -> None:
    live = llama(intermediate_size=96)
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(
        torch.int4, group_size=32, is_symmetric=True, scale_precision=torch.float16
    )
    both = QATConfig(activation_config=activation, weight_config=weight, step="prepare")
    quantize_(live, both, qat_config("int4-group").filter)
    assert any("the export does not round it" in note for note in open_model(live).notes)


@pytest.mark.parametrize(
    ("given", "told"),
    [(("int4-grup",), "not 'int4-grup'.*int4-group"), (("int4-group", 0), "group_size is 0")],
)
def test_configurations_that_are_none(given: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        qat_config(*given)
