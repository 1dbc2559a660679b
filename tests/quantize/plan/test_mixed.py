"""Mixed formats from flags to file: what is reachable, what is promised, what it is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_coreml
from artifacts import Artifact
from exported import SHAPES, TEXT, Run, in_process, manifest_of
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.eval.heldout import cut, read_text
from llm_coreml.fidelity import kl_divergence
from llm_coreml.lower.forms import Enumerated
from llm_coreml.model import Model, open_model
from llm_coreml.quantize import QuantizationPlan, make_plan
from llm_coreml.quantize.formats.schemes import Codebook, IntChannel, IntGroup
from llm_coreml.quantize.plan.budget import matrix_bits, mixed_options, other_bytes
from llm_coreml.quantize.plan.choose import choose_plan, plan_without_weights
from llm_coreml.quantize.plan.plan import matrices
from llm_coreml.quantize.quantized import build_decoder, build_original
from llm_coreml.recipes import bundled_model
from llm_coreml.tokenizer import Tokenizer
from tiny import small_spec

SPEC = small_spec(intermediate_size=104)
CODEBOOKS = tuple(Codebook(bits, 16) for bits in (2, 3, 4, 6))


# What may be chosen


def test_formats_are_those_that_target_and_shapes_allow() -> None:
    gpu = mixed_options(resolve(ExportConfig(bits=3.5), SPEC), SPEC)
    assert gpu.keys() == dict(matrices(SPEC)).keys()
    by_size = (*CODEBOOKS[:3], IntGroup(4, 32), CODEBOOKS[3], IntChannel(8))
    assert gpu["layers.0.self_attn.q_proj"] == by_size
    assert gpu["layers.1.mlp.up_proj"] == (IntGroup(4, 32), IntChannel(8)), "104 rows"
    assert gpu["layers.1.mlp.down_proj"] == (*CODEBOOKS, IntChannel(8)), "104 inputs"
    for target in ("ane", "all"):
        options = mixed_options(
            resolve(ExportConfig(bits=3.5, target=target, force=True), SPEC), SPEC
        )
        assert options["layers.0.self_attn.q_proj"] == (*CODEBOOKS, IntChannel(8))
    other = mixed_options(
        resolve(ExportConfig(bits=3.5, codebook_rows=8, group_size=8), SPEC), SPEC
    )
    assert other["layers.1.mlp.up_proj"][3] == IntGroup(4, 8)
    assert other["layers.1.mlp.up_proj"][0] == Codebook(2, 8)


def test_bits_beyond_the_formats_are_refused_with_what_is_reachable() -> None:
    """Counted by hand: 64 x 64 twice, 32 x 64 twice, 104 x 64 twice, 64 x 104."""
    square, narrow, mlp = 64 * 64, 32 * 64, 104 * 64
    least = 2 * (2 * square + 4 * 4 * 16) + 2 * (2 * narrow + 2 * 4 * 16)
    least += 2 * (4.5 * mlp) + (2 * mlp + 4 * 4 * 16)
    most = 8 * (2 * square + 2 * narrow + 3 * mlp) + 16 * (2 * 64 + 2 * 32 + 2 * 104 + 64)
    weights = 2 * square + 2 * narrow + 3 * mlp
    low, high = least / weights, most / weights
    message = f"formats take {low + 0.005:.2f} to {high - 0.005:.2f} bits per weight of this model"
    for bits in (1.5, low - 0.01, high + 0.01, 15.5):
        with pytest.raises(UnsupportedError) as caught:
            plan_without_weights(resolve(ExportConfig(bits=bits), SPEC), SPEC)
        assert message in str(caught.value) and f"--bits {bits} cannot" in str(caught.value)
    for bits in (low + 0.01, high - 0.01):
        job = resolve(ExportConfig(bits=bits), SPEC)
        limit = matrix_bits(job, SPEC, mixed_options(job, SPEC))
        assert 0 <= bits * 2 * weights - limit < 1
        plan_without_weights(job, SPEC)


def test_sizes_below_the_least_are_refused_with_what_is_reachable() -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan_without_weights(resolve(ExportConfig(size=100_000), SPEC), SPEC)
    words = str(caught.value).replace(",", "").split()
    least, most = (int(words[words.index("to") + step]) for step in (-1, 1))
    assert "--size 100,000 bytes cannot be reached" in str(caught.value)
    with pytest.raises(UnsupportedError):
        plan_without_weights(resolve(ExportConfig(size=least - 1), SPEC), SPEC)
    for size in (least, most, 10**12):
        plan_without_weights(resolve(ExportConfig(size=size), SPEC), SPEC)
    small = ExportConfig(size=least, embedding="int4-channel")
    limits = [
        matrix_bits(job, SPEC, mixed_options(job, SPEC))
        for job in (resolve(config, SPEC) for config in (ExportConfig(size=least), small))
    ]
    assert limits[1] - limits[0] == 2 * 1000 * 64 * 4, "both tables at half the bits"


@pytest.mark.parametrize(
    ("label", "settings"),
    [
        ("int4-group-8", {}),
        ("codebook-3", {}),
        ("codebook-4", {"target": "ane"}),
    ],
)
def test_programs_take_no_more_than_is_set_aside(
    quantized: Callable[[str], Artifact], label: str, settings: dict[str, Any]
) -> None:
    artifact = quantized(label)
    plan, spec = artifact.plan, artifact.decoder.spec
    linear = sum(plan.scheme_of(name).stored_bits(shape) for name, shape in matrices(spec)) / 8
    beside = artifact.path.stat().st_size - linear
    foreseen = other_bytes(resolve(ExportConfig(context=32, **settings), spec), spec, plan)
    assert foreseen - 16_000 < beside <= foreseen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3.5, "scheme": "codebook"}, "--bits 3.5 decides what --scheme codebook would"),
        ({"size": 10, "scheme": "none"}, "--size decides what --scheme none would; drop one"),
        ({"size": 10, "bits": 4}, "--size decides what --bits 4 would; drop one of them."),
        ({"plan": "p", "bits": 3.5}, "--plan decides what --bits 3.5 would; drop one of them."),
        ({"plan": "p", "size": 5}, "--plan decides what --size 5 would; drop one of them."),
        ({"plan": "p", "embedding": "none"}, "--plan decides what --embedding none would; drop"),
        ({"plan": "p", "lm_head": "none"}, "--plan decides what --lm-head none would; drop one"),
        ({"size": 0}, "--size is 0; give bytes, such as 600MB."),
        ({"size": 10**9, "backend": "xnnpack"}, "--size counts quantized weights, and --backend"),
        ({"bits": float("nan")}, "--bits is nan; Core ML holds weights of 1, 2, 3, 4, 6, 8 and"),
        ({"bits": float("inf")}, "--bits is inf; Core ML holds weights of 1, 2, 3, 4, 6, 8 and"),
        ({"bits": 0.5}, "--bits is 0.5; Core ML holds weights of 1, 2, 3, 4, 6, 8 and 16 bits."),
        ({"bits": -3.5}, "--bits is -3.5; Core ML holds weights of 1, 2, 3, 4, 6, 8 and 16 bits."),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExportConfig(**settings)
    assert str(caught.value).startswith(message)


def test_whole_bits_mean_one_format() -> None:
    for bits in (3, 3.0):
        config = ExportConfig(bits=bits, codebook_rows=8)
        assert not config.mixed and isinstance(config.bits, int)
        assert make_plan(resolve(config, SPEC), SPEC).linear == Codebook(3, 8)


# What it is worth


def divergence(model: Model, plan: QuantizationPlan, wanted: torch.Tensor) -> float:
    job = resolve(ExportConfig(scheme="none", context=256), model.spec)
    return float(kl_divergence(wanted, rows(build_decoder(model, job, plan))).mean())


def rows(decoder: Decoder) -> torch.Tensor:
    """Return what a model says of held-out text, `[tokens, vocab]`."""
    tokenizer = Tokenizer(bundled_model() / "tokenizer.json")
    found = []
    for window in cut(tokenizer.encode(read_text(None)[1]), 256, tokenizer.beginning, 512):
        decoder.reset()
        with torch.inference_mode():
            hidden = decoder.hidden(torch.tensor([list(window)]), torch.tensor([0]))
            found.append(decoder.head(hidden)[0])
    return torch.cat(found)


def mean_bits(plan: QuantizationPlan, spec: DecoderSpec) -> float:
    shapes = dict(matrices(spec))
    stored = sum(
        plan.scheme_of(name).bits_per_weight(s) * s[0] * s[1] for name, s in shapes.items()
    )
    return stored / sum(a * b for a, b in shapes.values())


def test_mixed_formats_beat_a_uniform_one_and_a_plain_mix_of_more_bytes() -> None:
    """On text that the formats were not chosen on."""
    model = open_model("llama")
    spec, wanted = model.spec, rows(build_original(model, context=256))
    job = resolve(ExportConfig(bits=3.4), spec)
    mixed, _ = choose_plan(model, job, bundled_model() / "tokenizer.json")
    assert 3.39 < mean_bits(mixed, spec) <= 3.4
    halves = {name: Codebook(3 + int(name[7]) // 2) for name, _ in matrices(spec)}
    found = divergence(model, mixed, wanted)
    for other in (
        make_plan(
            resolve(ExportConfig(bits=3, codebook_rows=1), spec), spec
        ),  # more tables: 3.42 bits
        make_plan(resolve(ExportConfig(), spec), spec, halves),  # 3.54 bits
    ):
        assert mean_bits(other, spec) > 3.4
        assert found < 0.9 * divergence(model, other, wanted)


# The file


@pytest.fixture
def export(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> Any:
    def command(output: Path, *words: str | Path) -> Run:
        return in_process(capfd, monkeypatch, "export", checkpoint, "-o", output, *SHAPES, *words)

    return command


def test_a_size_is_held_and_its_plan_makes_the_same_file(
    export: Any, checkpoint: Path, tmp_path: Path
) -> None:
    first, again, plan = tmp_path / "first", tmp_path / "again", tmp_path / "plan.json"
    done = export(first, "--size", "79.6KB")
    assert done.code == 0, done.err
    assert 60_000 < (first / "model.pte").stat().st_size <= 79_600
    manifest = open_bundle(first).manifest.to_json()
    described = manifest["quantization"]
    assert_described(described, done.out, (first / "README.md").read_text())
    assert manifest["rebuild"][3:5] == ["--size", "79600"]
    # The plan alone is as good as the manifest around it.
    plan.write_text(json.dumps(described["plan"]))
    done = export(again, "--plan", plan)
    assert done.code == 0, done.err
    assert (again / "model.pte").read_bytes() == (first / "model.pte").read_bytes()
    repeated = manifest_of(again)["quantization"]
    assert repeated["allocation"] is None
    assert repeated["linear"] == described["linear"]
    assert "block 0" in done.out
    quality = llm_coreml.evaluate(first, model=checkpoint, tokens=64).quality
    assert quality("artifact").perplexity == pytest.approx(
        quality("quantized").perplexity, rel=1e-3
    )


def assert_described(described: dict[str, Any], out: str, card: str) -> None:
    """Hold what is said of mixed formats together."""
    bits = described["linear"]["bits_per_weight"]
    assert described["linear"]["scheme"] == "mixed" and 2 < bits < 6
    label = described["linear"]["label"]
    assert label.startswith(f"mixed, {bits:.2f} bits per weight: ")
    counts = [int(part.split(" x ")[0]) for part in label.split(": ", 1)[1].split("; ")]
    assert len(counts) > 1 and sum(counts) == 7
    assert label in card and label in out
    entries = described["plan"]["matrices"]
    blocks = [entry for name, entry in entries.items() if name.startswith("layers.")]
    stored = sum(entry["bytes"] for entry in blocks)
    assert stored == described["linear"]["bytes"]
    assert "block 0" in out and f"{stored:,}" in out
    allocation = described["allocation"]
    assert (allocation["text"], allocation["tokens"]) == ("bundled", 1024)
    assert allocation["kl"] == pytest.approx(sum(entry["kl"] for entry in blocks))


def test_what_is_calibrated_on_a_text_is_measured_on_it(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(TEXT * 2)
    config = ExportConfig(bits=3.5, calibrate=str(text), calibration_tokens=200, context=64)
    model = open_model(checkpoint)
    job = resolve(config, model.spec)
    _, measured = choose_plan(model, job, checkpoint / "tokenizer.json")
    assert measured is not None
    assert (measured.text.name, measured.text.tokens) == ("mine.txt", 200)


def test_a_program_that_comes_out_larger_is_not_written(
    export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = bytes(79_601)
    monkeypatch.setattr(Enumerated, "write", lambda _, __, path, *___: path.write_bytes(large))
    done = export(tmp_path / "out", "--size", "79.6KB")
    assert done.code == 5
    assert "takes 79,601 bytes, more than --size 79,600: this model needs more" in done.err
    assert "Give --size 79599 to stay below it" in done.err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_cannot_be_measured(live_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--bits 3\.5 reads a text, and the model comes without"):
        llm_coreml.export(live_model, output=tmp_path / "out", bits=3.5, context=64)
    assert not (tmp_path / "out").exists()
