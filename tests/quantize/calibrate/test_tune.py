"""Recovery tuning: closer to the original, on the text and on text that it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.errors import CheckpointError
from llm_coreml.fidelity import kl_divergence
from llm_coreml.model import open_model
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.calibrate import tune as tuner
from llm_coreml.quantize.calibrate.tune import Tuning, _Student, tune
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.quantized import build_decoder
from tiny import llama, save, tokens_for

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 96}
TEXT = [tokens_for(97, 32, seed) for seed in range(24)]
UNSEEN = [tokens_for(97, 32, 100 + seed) for seed in range(8)]
CONFIGS = {
    "int4-channel": ExportConfig(scheme="int4-channel", context=64),
    "int4-zero": ExportConfig(scheme="int4-group", zero_point="float", context=64),
    "codebook": ExportConfig(scheme="codebook", bits=2, context=64, target="ane"),
    "blocks": ExportConfig(scheme="codebook", bits=2, codebook_columns=32, context=64),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(**SIZES), tmp_path_factory.mktemp("tuned") / "model")


def build(folder: Path, config: ExportConfig) -> Decoder:
    model = open_model(folder)
    job = resolve(config, model.spec)
    return build_decoder(model, job, make_plan(job, model.spec))


def original(folder: Path) -> Decoder:
    return build(folder, ExportConfig(scheme="none", embedding="none", context=64))


def divergence(decoder: Decoder, teacher: Decoder, windows: list[list[int]]) -> float:
    """Return the mean KL of what both give for every token, by the way that exports are read."""
    found = []
    for window in windows:
        logits = []
        for model in (teacher, decoder):
            model.reset()
            with torch.inference_mode():
                hidden = model.hidden(torch.tensor([window]), torch.tensor([0]))
                logits.append(model.head(hidden)[0])
        found.append(kl_divergence(*logits))
    return float(torch.cat(found).mean())


def test_what_fp16_cannot_hold_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "_RATE", 1e9)
    decoder, teacher = build(folder, CONFIGS["int4-channel"]), original(folder)
    before = [torch.cat(list(dense_rows(p))) for p in decoder.parameters()]
    tuning = tune(decoder, teacher, TEXT, 3)
    assert tuning.after == tuning.before
    after = [torch.cat(list(dense_rows(p))) for p in decoder.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_tuning_brings_the_logits_closer_and_keeps_the_codes(folder: Path, name: str) -> None:
    decoder, teacher = build(folder, CONFIGS[name]), original(folder)
    codes = {n: codes_of(p) for n, p in decoder.named_parameters() if "proj" in n}
    unseen = divergence(decoder, teacher, UNSEEN)
    shares: list[float] = []
    tuning = tune(decoder, teacher, TEXT, 80, shares.append)
    assert tuning.steps == 80 and shares[-1] == 1 and shares == sorted(shares)
    # Read by the decoder itself, so what was stored is what was judged.
    assert divergence(decoder, teacher, TEXT) == pytest.approx(tuning.after, rel=1e-3)
    assert tuning.after < 0.95 * tuning.before
    assert divergence(decoder, teacher, UNSEEN) < 0.97 * unseen
    for parameter, before in codes.items():
        assert torch.equal(codes_of(decoder.get_parameter(parameter)), before)
    for parameter in decoder.parameters():
        assert not parameter.requires_grad


def codes_of(weight: torch.Tensor) -> torch.Tensor:
    return next(getattr(weight, n) for n in ("qdata", "codes") if hasattr(weight, n)).clone()


def test_what_is_stored_is_fp16_numbers(folder: Path) -> None:
    decoder = build(folder, CONFIGS["int4-channel"])
    tune(decoder, original(folder), TEXT, 10)
    for name, parameter in decoder.named_parameters():
        values = getattr(parameter, "scale", parameter if "norm" in name else None)
        if values is not None:
            assert torch.equal(values, values.half().float()), name


def test_tuning_twice_gives_the_same(folder: Path) -> None:
    found = []
    for _ in range(2):
        decoder = build(folder, CONFIGS["codebook"])
        tune(decoder, original(folder), TEXT, 12)
        found.append([torch.cat(list(dense_rows(p))) for p in decoder.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_does_not_help_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "_RATE", 10.0)
    decoder, teacher = build(folder, CONFIGS["int4-channel"]), original(folder)
    before = divergence(decoder, teacher, TEXT)
    tuning = tune(decoder, teacher, TEXT, 5)
    assert isinstance(tuning, Tuning) and tuning.after == tuning.before
    assert divergence(decoder, teacher, TEXT) == pytest.approx(before, rel=1e-9)


def test_all_that_is_learned_by_is_on_the_device(folder: Path) -> None:
    """On tensors without contents, which may be said to be on a GPU, and refuse to be mixed.

    Tables are left out: without a GPU torch cannot index such tensors.
    """
    decoder, device = build(folder, CONFIGS["int4-zero"]), torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = _Student(decoder, device)
        logits = student.logits(TEXT[0])
    assert logits.device == device and tuple(logits.shape) == (32, 97)
    assert {value.device for values in student.values.values() for value in values} == {device}


def test_a_decoder_that_overflows_is_refused(folder: Path) -> None:
    decoder, teacher = build(folder, CONFIGS["int4-channel"]), original(folder)
    decoder.layers[1].mlp.down_proj.weight.scale.fill_(torch.inf)
    with pytest.raises(CheckpointError, match="without --tune"):
        tune(decoder, teacher, TEXT, 5)
