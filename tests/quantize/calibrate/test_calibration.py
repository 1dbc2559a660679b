"""Calibration block by block, from the text to the artifact."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_coreml
from exported import SHAPES, TEXT, Run, in_process, manifest_of
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.decoder.matrices import Linear
from llm_coreml.errors import CheckpointError, UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.progress import Silent
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.calibrate import calibration
from llm_coreml.quantize.calibrate.calibration import calibrated as calibrate
from llm_coreml.quantize.calibrate.moments import Moments
from llm_coreml.quantize.calibrate.text import (
    CalibrationText,
    common_passage,
    read_content,
    tokenize,
)
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.formats.schemes import IntChannel, Unquantized
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer
from tiny import llama, save, tokens_for

SIZES: dict[str, Any] = {"num_hidden_layers": 3, "intermediate_size": 96}
LENGTHS = (*[32] * 16, 9)  # several times as many tokens as a layer has inputs
WINDOWS = tuple(tuple(tokens_for(97, count, seed)) for seed, count in enumerate(LENGTHS))
CALIBRATION = CalibrationText("drawn", sum(LENGTHS), WINDOWS)
UNQUANTIZED = ExportConfig(scheme="none", embedding="int8-channel", context=32)
VALIDATION_SHA256 = "e821ae911a3e1bf1af7bc4dc98c2b59e5aebea28020c085c6a7b1a0d5d740247"
CALIBRATED = ExportConfig(scheme="int4-group", calibrate="drawn", context=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(**SIZES), tmp_path_factory.mktemp("calibrated") / "model")


def build(folder: Path, config: ExportConfig) -> Decoder:
    model = open_model(folder)
    text = CALIBRATION if config.calibrate else None
    job = resolve(config, model.spec)
    return build_decoder(model, job, make_plan(job, model.spec), calibration=text)


def inputs_of(decoder: Decoder, layer: str) -> torch.Tensor:
    """Return what a layer gets when the whole decoder reads the windows, `[tokens, in]`."""
    seen: list[torch.Tensor] = []
    handle = decoder.get_submodule(layer).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][0].double())
    )
    for window in WINDOWS:
        decoder.reset()
        with torch.inference_mode():
            decoder(torch.tensor([window]), torch.tensor([0]))
    handle.remove()
    return torch.cat(seen)


def test_each_layer_is_calibrated_on_what_the_quantized_ones_before_it_give(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Moments] = []

    def recorded(weights: Any, scheme_of: Any, moments: Moments, codes: Any) -> Any:
        hessian, drift, of_outputs = moments
        found.append(Moments(hessian.clone(), drift, of_outputs))
        return calibrate(weights, scheme_of, moments, codes)

    monkeypatch.setattr(calibration, "calibrated", recorded)
    calibrated, judge = build(folder, CALIBRATED), build(folder, UNQUANTIZED)
    original = build(folder, UNQUANTIZED)
    shared = judge.block(0).wiring.shared
    # From the first layer on, the judge takes over what is quantized, and nothing else.
    for index in range(3):
        for names in shared:
            layers = [f"layers.{index}.{name}" for name in names]
            inputs = inputs_of(judge, layers[0])
            away = inputs_of(original, layers[0]) - inputs
            hessian, drift, of_outputs = found.pop(0)
            weight = original.get_parameter(f"{layers[0]}.weight").double()
            moved = away @ weight.T if of_outputs else away
            for ours, theirs in ((hessian, inputs), (drift, moved)):
                expected = (theirs.T @ inputs / inputs.square().sum(0).mean()).float()
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
            for name in layers:
                judge.get_submodule(name).weight = calibrated.get_submodule(name).weight
            # Nothing has been quantized before the first of all, and something before the others.
            assert bool(away.any()) == (index > 0 or names != shared[0])
    assert found == []


def test_every_layer_computes_a_window_once_and_once_as_it_was_but_for_what_is_too_wide_to_keep(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    forward = Linear.forward

    def counted(linear: Linear, x: torch.Tensor) -> torch.Tensor:
        seen.append((linear.out_features, linear.in_features))
        return forward(linear, x)

    monkeypatch.setattr(Linear, "forward", counted)
    decoder = build(folder, CALIBRATED)
    wanted = []
    for name, module in decoder.layers.named_modules():
        if isinstance(module, Linear):
            times = 3 if name.endswith(("gate_proj", "up_proj")) else 2
            wanted += times * len(WINDOWS) * [(module.out_features, module.in_features)]
    assert sorted(seen) == sorted(wanted)


@pytest.mark.parametrize("of_outputs", [False, True])
def test_a_layer_makes_up_for_what_happened_before_it(of_outputs: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 32, generator=generator)
    wanted = inputs + 0.1 * inputs @ torch.randn(32, 32, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    hessian, drift = (other.T @ inputs / 400 for other in (inputs, wanted - inputs))
    moments = Moments(hessian, weight @ drift if of_outputs else drift, of_outputs)
    ((name, found),) = calibrate({"layer": weight}, lambda _: IntChannel(8), moments)
    assert name == "layer"
    left = (inputs @ found.dequantize().T - wanted @ weight.T).square().sum()
    assert left < 0.02 * (inputs @ weight.T - wanted @ weight.T).square().sum()


def test_an_error_says_which_layer_it_is_about() -> None:
    weights = {name: torch.randn(8, 32) for name in ("first", "second")}
    moments = Moments(torch.eye(32), torch.zeros(32, 32), False)
    found = calibrate(weights, {"first": IntChannel(8), "second": Unquantized()}.get, moments)
    assert next(found)[0] == "first"
    with pytest.raises(UnsupportedError, match=r"^second: 'none' has no codes"):
        next(found)
    hopeless = Moments(-torch.eye(32), torch.zeros(32, 32), False)
    with pytest.raises(CheckpointError, match=r"^first: the inputs"):
        next(calibrate(weights, lambda _: IntChannel(8), hopeless))


def test_layers_with_shared_inputs_get_the_same() -> None:
    decoder = Decoder(open_spec(), context=32)
    linears = {
        name
        for name, module in decoder.layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    shared = decoder.block(0).wiring.shared
    assert {name for names in shared for name in names} == linears


def open_spec() -> Any:
    return open_model(llama(**SIZES)).spec


def test_calibration_brings_the_logits_closer_and_leaves_no_trace(folder: Path) -> None:
    original, calibrated = build(folder, UNQUANTIZED), build(folder, CALIBRATED)
    rounded = build(folder, ExportConfig(scheme="int4-group", context=32))
    assert not any(state.any() for state in calibrated.states["cache"].buffers())
    for name, parameter in calibrated.named_parameters():
        same = torch.equal(
            *(torch.cat(list(dense_rows(p))) for p in (parameter, rounded.get_parameter(name)))
        )
        assert same == (not name.startswith("layers") or "norm" in name), name
    errors = {}
    for label, decoder in (("calibrated", calibrated), ("rounded", rounded)):
        total = 0.0
        for seed in range(4):
            tokens = torch.tensor([tokens_for(97, 32, seed=100 + seed)])
            with torch.inference_mode():
                wanted = original.hidden(tokens, torch.tensor([0]))
                total += float((decoder.hidden(tokens, torch.tensor([0])) - wanted).square().sum())
        errors[label] = total
    assert errors["calibrated"] < errors["rounded"]


def test_a_config_and_a_text_belong_together(folder: Path) -> None:
    model = open_model(folder)
    with pytest.raises(ValueError, match="belong together"):
        job = resolve(CALIBRATED, model.spec)
        build_decoder(model, job, make_plan(job, model.spec))


# The text


def test_the_bundled_text_shares_no_passage_with_the_held_out_one() -> None:
    calibration = read_content("bundled")
    heldout = (bundled_model() / "heldout.txt").read_text(encoding="utf-8")
    assert common_passage(calibration, heldout) is None
    paragraphs = [" ".join(part.split()) for part in calibration.split("\n\n")]
    known = " ".join(heldout.split())
    assert [part for part in paragraphs if len(part) > 80 and part in known] == []
    assert common_passage(calibration, heldout[60_000:61_000] + calibration[5_000:6_000])


def test_the_bundled_text_is_three_long_ones_and_begins_with_what_was_not_trained_on() -> None:
    content = read_content("bundled")
    tokenizer = Tokenizer(bundled_model() / "tokenizer.json")
    found = tokenizer.encode(content)
    assert len(found) >= 3 * 64_000
    beginning = content.encode()[:75_742]
    assert hashlib.sha256(beginning).hexdigest() == VALIDATION_SHA256
    record = json.loads((bundled_model() / "training.json").read_text())
    assert len(tokenizer.encode(beginning.decode())) == record["validation_tokens"]


def test_windows_are_the_text_in_order(checkpoint: Path) -> None:
    found = tokenize("x/some.txt", TEXT, checkpoint / "tokenizer.json", 100, context=32)
    assert found.name == "some.txt" and found.tokens == 100
    assert [len(window) for window in found.windows] == [32, 32, 32, 8]
    assert {window[0] for window in found.windows} == {0}
    assert sum(map(len, found.windows)) == 100 + 4
    other = tokenize("x/some.txt", TEXT, checkpoint / "tokenizer.json", 99, context=32)
    assert other.sha256 != found.sha256
    tokens = Tokenizer(checkpoint / "tokenizer.json").encode(TEXT)
    assert [token for window in found.windows for token in window[1:]] == tokens[:100]


# The artifact


class Notes(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def export(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> Any:
    def command(text: Path, output: Path) -> Run:
        words = ("export", checkpoint, "-o", output, *SHAPES, "--calibrate", text)
        return in_process(capfd, monkeypatch, *words, "--calibration-tokens", "200", "--tune", "4")

    return command


def test_a_calibrated_export_is_verified_recorded_and_the_same_every_time(
    export: Any, bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(TEXT * 2)
    first, second = tmp_path / "first", tmp_path / "second"
    for output in (first, second):
        done = export(text, output)
        assert done.code == 0, done.err
        assert "by GPTQ on 200 tokens of text 'mine.txt', then tuned in 4 steps" in done.out
    assert (first / "model.pte").read_bytes() == (second / "model.pte").read_bytes()
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    assert (first / "model.pte").read_bytes() != (bundle / "model.pte").read_bytes()
    manifest = open_bundle(first).manifest.to_json()
    plain = manifest_of(bundle)
    assert manifest["verification"]["conversion"]["weights"] > 0
    assert manifest["program"]["bytes"] == pytest.approx(plain["program"]["bytes"], rel=1e-3)
    recorded = manifest["quantization"]["calibration"]
    assert recorded["method"] == "GPTQ" and recorded["tokens"] == 200
    tuning = recorded["tuning"]
    assert tuning["steps"] == 4 and 0 < tuning["kl_after"] <= tuning["kl_before"]
    assert plain["quantization"]["calibration"] is None
    flags = manifest["rebuild"]
    assert flags[flags.index("--calibrate") + 1] == "mine.txt"
    assert str(text.parent) not in (first / "manifest.json").read_text()
    assert flags[flags.index("--calibration-tokens") + 1] == "200"
    assert flags[flags.index("--tune") + 1] == "4"
    card = (first / "README.md").read_text()
    assert "calibrated by GPTQ on 200 tokens of mine.txt, then tuned in 4 steps" in card
    assert "rounded to nearest" in (bundle / "README.md").read_text()
    evaluation_knows_the_quantized_model_while_it_knows_the_text(first, checkpoint, text)


def evaluation_knows_the_quantized_model_while_it_knows_the_text(
    folder: Path, checkpoint: Path, text: Path
) -> None:
    # A manifest has the text's name alone; it lies beside the bundle.
    assert text.parent == folder.parent
    result = llm_coreml.evaluate(folder, model=checkpoint, tokens=64)
    quantized, artifact = result.quality("quantized"), result.quality("artifact")
    assert artifact.perplexity == pytest.approx(quantized.perplexity, rel=1e-3)
    for change in (lambda: text.write_text(TEXT.upper() * 3), text.unlink):
        change()
        progress = Notes()
        result = llm_coreml.evaluate(folder, model=checkpoint, tokens=64, progress=progress)
        assert [row.name for row in result.qualities] == ["original", "artifact"]
        (note,) = progress.notes
        assert "left out" in note and "mine.txt" in note
