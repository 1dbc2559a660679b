"""Products beside quantized matrices: what rounding took, and what training makes of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_coreml.config import ExportConfig, resolve
from llm_coreml.cuts import Cuts
from llm_coreml.decoder import Decoder
from llm_coreml.errors import ConfigError, UnsupportedError
from llm_coreml.lower.cut_rows import cut_rows
from llm_coreml.lower.shares import cut_of
from llm_coreml.model import Model, open_model
from llm_coreml.progress import Silent
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.calibrate.text import CalibrationText
from llm_coreml.quantize.calibrate.tune import tune
from llm_coreml.quantize.formats.round import dense_rows
from llm_coreml.quantize.low_rank import (
    attach,
    factor_bits,
    factors_of,
    largest_rank,
    residual_factors,
)
from llm_coreml.quantize.plan.budget import other_bytes
from llm_coreml.quantize.plan.plan import matrices
from llm_coreml.quantize.quantized import build_decoder, build_original, quantize
from llm_coreml.runtime.eager import EagerRunner
from tiny import expected_logits, llama, save, tokens_for

CONFIG = ExportConfig(scheme="codebook", bits=2, context=64, target="ane")
TEXT = [tokens_for(97, 32, seed) for seed in range(16)]
PLAIN = "layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def live() -> Any:
    return llama(num_hidden_layers=2, intermediate_size=96)


@pytest.fixture(scope="module")
def model(live: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(save(live, tmp_path_factory.mktemp("low_rank") / "model"))


@pytest.fixture(scope="module")
def built(model: Model) -> Decoder:
    job = resolve(CONFIG, model.spec)
    return build_decoder(model, job, make_plan(job, model.spec))


def dense(module: nn.Module) -> torch.Tensor:
    return torch.cat(list(dense_rows(module.get_parameter("weight"))))


def test_the_factors_are_the_best_of_their_rank(model: Model, built: Decoder) -> None:
    before = torch.get_rng_state()
    found = residual_factors(built, model.weights, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == 14  # seven matrices in each of two layers
    down, up = found[PLAIN]
    lost = model.weights.tensor(f"{PLAIN}.weight", torch.float32)
    lost -= dense(built.get_submodule(PLAIN))
    sizes = torch.linalg.svdvals(lost)
    assert (lost - up @ down).norm() == pytest.approx(float(sizes[3:].norm()), rel=1e-3)
    # Of more than the matrix has, it is all of it.
    down, up = residual_factors(built, model.weights, 256)[PLAIN]
    assert down.shape[0] == min(lost.shape)
    torch.testing.assert_close(up @ down, lost, atol=1e-5, rtol=0)


def test_they_compute_what_the_sum_would(built: Decoder, model: Model) -> None:
    decoder = copy.deepcopy(built)
    attach(decoder, residual_factors(decoder, model.weights, 3))
    linear = decoder.get_submodule(PLAIN)
    down, up = dict(factors_of(decoder))[PLAIN]
    assert (down.dtype, up.dtype) == (torch.float16, torch.float16)
    x = torch.randn(1, 5, 64)
    wanted = x @ (dense(linear) + up.float() @ down.float()).T
    torch.testing.assert_close(linear(x), wanted, atol=1e-4, rtol=1e-4)
    assert largest_rank(decoder) == 3 and largest_rank(built) == 0
    shapes = [module.weight.shape for _, module in linears(decoder)]
    assert factor_bits(decoder) == sum(16 * 3 * (rows + columns) for rows, columns in shapes)
    # Each is a layer of its own, which is cut as one.
    cut = cut_rows(decoder, Cuts(linear=16))
    assert cut[f"{PLAIN}.up"] == [[0, 16, 32, 48, 64]] and f"{PLAIN}.down" not in cut
    with pytest.raises(UnsupportedError, match="fp16 ends at 65504"):
        attach(decoder, {PLAIN: (down.float() * 1e9, up)})


def linears(decoder: Decoder) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in decoder.layers.named_modules() if isinstance(m, nn.Linear)]


def test_a_sorted_matrix_reads_sorted_inputs(built: Decoder) -> None:
    """Where columns lie in another order, so do those of what is beside them."""
    decoder = copy.deepcopy(built)
    linear: Any = decoder.get_submodule(PLAIN)
    order = torch.randperm(64)
    linear.input_order = order.to(torch.int32)
    down, up, x = torch.randn(2, 64).half().float(), torch.randn(64, 2).half(), torch.randn(3, 64)
    before = linear(linear.arrange(x))
    attach(decoder, {PLAIN: (down, up)})
    beside = linear(linear.arrange(x)) - before
    torch.testing.assert_close(beside, x @ down.T @ up.float().T, atol=1e-3, rtol=1e-3)


def test_training_them_beats_scales_alone(model: Model, built: Decoder, live: Any) -> None:
    teacher = build_original(model, 64)
    alone, recovered = copy.deepcopy(built), copy.deepcopy(built)
    of_scales = tune(alone, teacher, TEXT, 40)
    attach(recovered, residual_factors(recovered, model.weights, 4))
    first = {name: down.clone() for name, (down, _) in factors_of(recovered)}
    found = tune(recovered, teacher, TEXT, 40, recover=True)
    assert found.before < of_scales.before and found.after < of_scales.after * 0.8
    now = dict(factors_of(recovered))
    assert all(not torch.equal(first[name], now[name][0]) for name in first)
    assert {each.dtype for pair in now.values() for each in pair} == {torch.float16}
    # On a text that it never saw, too.
    tokens = tokens_for(97, 48, 100)
    expected = expected_logits(live, tokens)
    errors = [
        float((EagerRunner(each, "").logits(tokens) - expected).norm())
        for each in (built, alone, recovered)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_an_export_goes_that_way(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CalibrationText("text", 512, tuple(map(tuple, TEXT)))
    settings = ExportConfig(
        bits=2, context=64, calibrate="bundled", tune=2, recover="lora:4", rotate="both"
    )
    job = resolve(settings, model.spec)
    found = quantize(model, job, Path("none"), Silent(), calibration=text)
    assert largest_rank(found.decoder) == 4 and len(list(factors_of(found.decoder))) == 14
    assert found.tuning is not None and found.tuning.after <= found.tuning.before


def test_sizes_count_what_is_trained(model: Model) -> None:
    settings = ExportConfig(bits=4, context=64, calibrate="bundled", tune=2, split=("head",))
    jobs = [resolve(replace(settings, recover=each), model.spec) for each in (None, "lora:4")]
    plan = make_plan(jobs[0], model.spec)
    nbytes = sum(2 * 4 * sum(shape) for _, shape in matrices(model.spec))
    before, after = (other_bytes(job, model.spec, plan) for job in jobs)
    assert nbytes < after - before < nbytes + 14 * 2049  # the rest is the program's text
    (first, head), (more, same) = (cut_of(job, model.spec, plan).sizes for job in jobs)
    assert nbytes < more - first < nbytes + 14 * 1024 and same == head


@pytest.mark.parametrize("value", ["lora", "lora:", "lora:0", "lora:257", "lora:-1", "dora:4", "4"])
def test_a_wrong_rank_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="give lora:RANK, with a rank from 1 to 256"):
        ExportConfig(recover=value, tune=5, calibrate="bundled")


def test_what_cannot_be_together_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="is trained in the steps of --tune"):
        ExportConfig(recover="lora:4")
    recovered = {"recover": "lora:4", "tune": 5, "calibrate": "bundled"}
    for settings in (
        {"adapters": "beside", **recovered},
        {"adapters": "beside", "rotate": "both"},
        {"adapters": "beside", "pt2e": "weights"},
    ):
        with pytest.raises(ConfigError, match="drop one of them"):
            resolve(ExportConfig(**settings), model.spec)
    for settings, told in (
        ({}, "needs an adapter that lies in files"),
        ({"residual_shift": 1}, "give --adapters merged"),
    ):
        job = resolve(ExportConfig(adapters="beside", context=64, **settings), model.spec)
        with pytest.raises(UnsupportedError, match=told):
            quantize(model, job, Path("none"), Silent())
