"""Merged rotations: the same function from other weights, which lose less when they are rounded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

import llm_coreml
from exported import SHAPES, in_process, manifest_of
from llm_coreml.bundle.folder import open_bundle
from llm_coreml.bundle.manifest import manifest_schema
from llm_coreml.checkpoint.weights_view import FamilyWeights, Stored, Weights
from llm_coreml.config import ExportConfig, Rotate, resolve
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.spec import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
)
from llm_coreml.errors import CheckpointError, ConfigError, UnsupportedError
from llm_coreml.fidelity import kl_divergence
from llm_coreml.model import open_model
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.calibrate.text import CalibrationText
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.quantize.rotate.hadamard import Rotation, paley
from llm_coreml.quantize.rotate.rotation import rotated, rotations
from tiny import expected_logits, llama, mistral, save, small_spec, tokens_for

EXACT: dict[str, Any] = {"scheme": "none", "embedding": "none", "compute_precision": "fp32"}
START = torch.tensor([0])


def build(source: Any, **settings: Any) -> Decoder:
    model = open_model(source)
    config = ExportConfig(context=64, logits="all", **settings)
    text = None
    if config.calibrate:
        windows = tuple(tuple(tokens_for(97, 60, seed)) for seed in range(16))
        text = CalibrationText(config.calibrate, 960, windows)
    job = resolve(config, model.spec)
    return build_decoder(model, job, make_plan(job, model.spec), calibration=text)


def logits_of(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = decoder(torch.tensor([tokens]), START)[0]
    return result


# The matrices


@pytest.mark.parametrize(
    ("size", "label"),
    [
        (2, "Sylvester 2"),
        (64, "Sylvester 64"),
        (256, "Sylvester 256"),
        (96, "Sylvester 8 x Paley 12"),
        (576, "Sylvester 16 x Paley 36"),
        (960, "Sylvester 16 x Paley 60"),
        (640, "Sylvester 32 x Paley 20"),
        (28, "Paley 28"),
        (6, "Sylvester 2 x Hartley 3"),
        (92, "Sylvester 4 x Hartley 23"),
        (45, "Hartley 45"),
    ],
)
def test_rotations_are_orthogonal_and_spread_every_number_evenly(size: int, label: str) -> None:
    rotation = Rotation(size)
    matrix = rotation.apply(torch.eye(size, dtype=torch.float64))
    assert rotation.label == label
    assert (matrix @ matrix.T - torch.eye(size)).abs().max() < 1e-12
    largest = float(matrix.abs().max()) * size**0.5
    assert largest < (2**0.5 if "Hartley" in label else 1 + 1e-12)
    # Without signs a constant row would become a single number.
    row = rotation.apply(torch.ones(size, dtype=torch.float64))
    assert size < 20 or row.abs().max() < 0.8 * size**0.5


def test_paley_has_the_orders_that_it_should_and_they_are_hadamard_matrices() -> None:
    known = {4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60, 68, 72, 76, 80, 84}
    found = {order: matrix for order in range(1, 90) if (matrix := paley(order)) is not None}
    assert found.keys() == known
    for order, matrix in found.items():
        whole = matrix.to(torch.int64)
        assert torch.equal(whole.abs(), torch.ones(order, order, dtype=torch.int64))
        assert torch.equal(whole @ whole.T, order * torch.eye(order, dtype=torch.int64))


def test_each_block_of_the_last_axis_is_rotated_alike() -> None:
    rotation = Rotation(24)
    matrix = rotation.apply(torch.eye(24, dtype=torch.float64))
    values = torch.randn(5, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = values @ torch.block_diag(matrix, matrix, matrix)
    torch.testing.assert_close(rotation.apply(values), expected, rtol=0, atol=1e-13)
    assert not torch.equal(Rotation(24, seed=1).apply(values), rotation.apply(values))


# The decoder


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (llama, {"num_hidden_layers": 2}),
        (llama, {"num_hidden_layers": 2, "tie_word_embeddings": True}),
        (llama, {"attention_bias": True, "mlp_bias": True}),
        (llama, {"hidden_size": 48, "head_dim": 12, "num_key_value_heads": 1}),
        (llama, {"hidden_size": 30, "head_dim": 10, "num_attention_heads": 6}),
        (mistral, {"sliding_window": None, "head_dim": 24}),
    ],
    ids=["untied", "tied", "biases", "paley", "hartley", "mistral"],
)
@pytest.mark.parametrize("rotate", ["residual", "heads", "both"])
def test_a_rotated_decoder_computes_the_same(make: Any, changes: Any, rotate: str) -> None:
    source, tokens = make(**changes), tokens_for(97, 64)
    decoder = build(source, **EXACT, rotate=rotate)
    expected = expected_logits(source, tokens)
    error = (logits_of(decoder, tokens) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize(
    ("rotate", "same"),
    [
        ("residual", ("k_proj.bias", "gate_proj.bias", "up_proj.bias", "q_proj.bias")),
        ("heads", ("q_proj", "k_proj", "mlp", "norm", "embed_tokens", "lm_head", "o_proj.bias")),
        ("both", ("k_proj.bias", "gate_proj.bias", "up_proj.bias", "q_proj.bias")),
    ],
)
def test_what_is_rotated(rotate: str, same: tuple[str, ...]) -> None:
    model = open_model(llama(attention_bias=True, mlp_bias=True))
    weights, _ = rotated(model.weights, model.spec, rotate)  # type: ignore[arg-type]
    for ours in weights.names():
        before, after = (view.tensor(ours, torch.float32) for view in (model.weights, weights))
        kept = any(part in ours for part in same)
        if rotate == "residual" and "v_proj.bias" in ours:
            kept = True
        assert torch.equal(before, after) == kept, ours
        if rotate != "heads" and "norm" in ours:
            assert torch.equal(after, torch.ones(64)), ours
        elif "proj" not in ours and rotate != "heads":
            gain = model.checkpoint.stored("model.norm.weight") if "lm_head" in ours else 1.0
            gram = (before * gain) @ (before * gain).T
            torch.testing.assert_close(after @ after.T, gram, rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_stored_apart_only_where_the_last_norm_moves_into_it() -> None:
    source = llama(tie_word_embeddings=True, intermediate_size=96)
    model = open_model(source)
    for rotate, apart in (("none", False), ("heads", False), ("residual", True), ("both", True)):
        config = ExportConfig(context=64, rotate=rotate)  # type: ignore[arg-type]
        job = resolve(config, model.spec)
        plan = make_plan(job, model.spec)
        assert plan.tied != apart
        assert plan.untied_bytes == apart * 97 * (64 + 2)
        decoder = build(source, rotate=rotate)
        assert (decoder.lm_head.weight is decoder.embed_tokens.weight) != apart
    own = ExportConfig(context=64, rotate="residual", lm_head="int4-channel")
    job = resolve(own, model.spec)
    assert make_plan(job, model.spec).untied_bytes == 97 * (64 // 2 + 2)


def test_rotations_are_the_same_every_time() -> None:
    source = llama(hidden_size=48)
    first, second = (build(source, **EXACT, rotate="both").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# What it is for


SIZES: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 96}


def with_outliers() -> Any:
    """Return a model in which one channel is small, and made up for by large weights."""
    model = llama(**SIZES)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj")):
                weight[:, 3] *= 8
            elif "embed" in name:
                weight[:, 3] /= 8
            elif "o_proj" in name or "down_proj" in name:
                weight[3] /= 8
    return model


def divergences(source: Any, *settings: dict[str, Any]) -> list[float]:
    """Return the mean KL divergence of each build from the model as it is."""
    tokens = tokens_for(97, 64, seed=1)
    expected = expected_logits(source, tokens)
    return [
        float(kl_divergence(expected, logits_of(build(source, **given), tokens)).mean())
        for given in settings
    ]


def test_an_outlying_channel_costs_a_rotated_model_little() -> None:
    plain: dict[str, Any] = {"scheme": "int4-channel", "embedding": "none"}
    rounded, turned = divergences(with_outliers(), plain, {**plain, "rotate": "both"})
    (without,) = divergences(llama(**SIZES), {**plain, "rotate": "both"})
    assert turned < rounded / 3
    # Five times as much if it is not rotated.
    assert turned < 1.5 * without


def test_a_rotated_model_is_calibrated_on_rotated_inputs() -> None:
    plain: dict[str, Any] = {"scheme": "int4-channel", "embedding": "none", "rotate": "both"}
    rounded, calibrated = divergences(with_outliers(), plain, {**plain, "calibrate": "drawn"})
    assert calibrated < rounded


# What is wrong with a tensor


@pytest.mark.parametrize("rotate", ["residual", "heads", "both"])
def test_a_value_that_is_no_number_is_named_where_it_stands(tmp_path: Path, rotate: str) -> None:
    folder = save(llama(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"o_proj.weight' in .* is nan at \[3, 4\]"):
        build(folder, scheme="int4-channel", rotate=rotate)


def test_a_value_that_outgrows_fp16_in_the_rotation_is_named() -> None:
    source = llama()
    with torch.no_grad():
        source.model.layers[0].mlp.up_proj.weight[5] = 6e4
    build(source, scheme="none")
    with pytest.raises(CheckpointError, match=r"up_proj.weight' in .* \(rotated\) is .* \[5, "):
        build(source, scheme="none", rotate="both")


def test_a_family_with_an_unknown_tensor_is_refused() -> None:
    model = open_model(llama())

    stored = model.family.stored(model.spec)
    stored["layers.0.self_attn.q_norm.weight"] = Stored(("model.norm.weight",))
    with pytest.raises(UnsupportedError, match=r"'model.norm.weight' .* leave --rotate out"):
        rotated(FamilyWeights(model.checkpoint, stored), model.spec, "residual")


def test_a_norm_that_takes_off_the_mean_is_refused() -> None:
    spec = small_spec()
    for norm in (NormSpec(kind="layer"), NormSpec(bias=True)):
        with pytest.raises(UnsupportedError, match="off the mean or adds a bias; leave --rotate"):
            rotations("residual", replace(spec, norm=norm))
        assert "heads" in rotations("heads", replace(spec, norm=norm))


class Held(Weights):
    """The weights of a decoder as they stand in it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self._decoder.named_parameters())

    def dtype(self, name: str) -> torch.dtype:
        return self._decoder.get_parameter(name).dtype

    def described(self, name: str) -> str:
        return f"'{name}'"

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._decoder.get_parameter(name).detach().to(dtype, copy=True)

    def sha256(self, names: Collection[str]) -> str:
        return repr(sorted(names))

    def forms(self) -> Mapping[str, Any]:
        return {}

    def packed(self, name: str) -> None:
        return None


def random_decoder(*layers: LayerSpec) -> Decoder:
    spec = DecoderSpec("tiny", 97, 64, 64, layers, rotary=(RopeSpec(16),), residual_multiplier=0.7)
    decoder, generator = Decoder(spec, 64, logits="all"), torch.Generator().manual_seed(0)
    for name, parameter in list(decoder.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        values = torch.nn.Parameter(1 + noise if "norm" in name else noise, requires_grad=False)
        setattr(decoder.get_submodule(owner), attribute, values)
    return decoder


HEADS, MLP = AttentionSpec(4, 2, 16), MLPSpec(80)


@pytest.mark.parametrize("rotate", ["residual", "heads", "both"])
def test_layers_that_differ_are_rotated_each_by_its_wiring(rotate: Rotate) -> None:
    """Norms of queries and keys stay; what is read without a norm has no gain to take in."""
    decoder = random_decoder(
        LayerSpec(replace(HEADS, qk_norm=QKNormSpec(), qkv_bias=True, window=9), MLP),
        LayerSpec(replace(HEADS, norm=None, num_key_value_heads=1), replace(MLP, gated=False)),
    )
    tokens, weights = tokens_for(97, 64), Held(decoder)
    expected = logits_of(decoder, tokens)
    turned, spec = rotated(weights, decoder.spec, rotate)
    other = Decoder(spec, 64, logits="all")
    changed = []
    for name in sorted(weights.names()):
        owner, _, attribute = name.rpartition(".")
        values = turned.tensor(name, torch.float32)
        if not torch.equal(values, weights.tensor(name, torch.float32)):
            changed.append(name)
        parameter = torch.nn.Parameter(values, requires_grad=False)
        setattr(other.get_submodule(owner), attribute, parameter)
    assert any("v_proj" in name for name in changed)
    assert not any("q_norm" in name or "k_norm" in name for name in changed)
    error = (logits_of(other, tokens) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_a_norm_of_what_a_layer_writes_is_refused() -> None:
    decoder = random_decoder(LayerSpec(replace(HEADS, out_norm=NormSpec()), MLP))
    with pytest.raises(UnsupportedError, match=r"'layers.0.attention_out_norm.weight' is mult"):
        rotated(Held(decoder), decoder.spec, "residual")


def test_heads_of_several_widths_are_refused() -> None:
    layers = LayerSpec(HEADS, MLP), LayerSpec(replace(HEADS, head_dim=32), MLP)
    decoder = random_decoder(*layers)
    with pytest.raises(UnsupportedError, match=r"--rotate both wants .* 16, 32; leave --rotate"):
        rotated(Held(decoder), decoder.spec, "both")


def test_an_unknown_rotation_is_refused() -> None:
    with pytest.raises(ConfigError, match="rotate is 'all'; it must be none or residual or heads"):
        ExportConfig(rotate="all")  # type: ignore[arg-type]


# The artifact


def test_a_rotated_export_is_verified_recorded_and_measured_against_the_original(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    bundle: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "rotated"
    words = ("export", checkpoint, "-o", folder, *SHAPES, "--bits", "8", "--rotate", "both")
    done = in_process(capfd, monkeypatch, *words)
    assert done.code == 0, done.err
    assert "the gain of the last norm" in done.err and f"{300 * 34:,} bytes" in done.err
    assert "residual stream (Sylvester 32), values of the heads (Sylvester 8)" in done.out
    manifest = open_bundle(folder).manifest.to_json()
    jsonschema.validate(manifest, manifest_schema())
    assert manifest["verification"]["conversion"]["weights"] > 0
    assert manifest["quantization"]["rotation"] == {
        "residual": {"size": 32, "factors": "Sylvester 32"},
        "heads": {"size": 8, "factors": "Sylvester 8"},
        "seed": 0,
    }
    words = manifest["rebuild"]
    assert words[words.index("--rotate") + 1] == "both"
    assert "| rotated, in the weights | residual stream" in (folder / "README.md").read_text()
    plain = manifest_of(bundle)
    assert plain["quantization"]["rotation"] is None
    assert manifest["source"]["sha256"] == plain["source"]["sha256"]
    result = llm_coreml.evaluate(folder, model=checkpoint, tokens=64)
    original, artifact = result.quality("original"), result.quality("artifact")
    assert artifact.perplexity == pytest.approx(original.perplexity, rel=0.02)
    assert artifact.mean_kl is not None and artifact.mean_kl < 5e-3
