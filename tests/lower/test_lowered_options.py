"""What layers may be told to do is lowered: to Core ML in both forms, and to the twin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import coremltools as ct
import pytest
import torch
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from torch import nn

import llm_coreml.lower.coreml_ops  # noqa: F401 - registers
from artifacts import feed, program
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.decoder.caches import Cache, KVCache, RingCache, kv_write, ring_write
from llm_coreml.decoder.spec import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    NormSpec,
    PerLayerSpec,
    QKNormSpec,
    QueryGrowth,
    RopeSpec,
)
from llm_coreml.lower.forms import form_for
from llm_coreml.lower.xnnpack import WRITES
from llm_coreml.reference.program.aliasing import choose_updates
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.executorch import ExecutorchRunner
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.runtime.runner import Runner
from tiny import random_split, tokens_for

CONTEXT = 64
LENGTHS = (1, 3, 8)
NORM = NormSpec()
HEADS = AttentionSpec(4, 2, 16)
MLP = MLPSpec(80)
LAYERS = (
    LayerSpec(
        replace(HEADS, window=9, scale=0.3, qk_norm=QKNormSpec(), out_norm=NORM),
        replace(MLP, activation="gelu_tanh", out_norm=NORM),
    ),
    LayerSpec(
        replace(HEADS, rope=1, softcap=2.0, norm=None, qk_norm=QKNormSpec(over="all")),
        replace(MLP, gated=False, activation="relu2", norm=None),
    ),
    LayerSpec(replace(HEADS, num_key_value_heads=1, rope=None, qkv_bias=True), MLP),
)
SPEC = DecoderSpec(
    "tiny",
    vocab_size=97,
    hidden_size=64,
    max_position_embeddings=CONTEXT,
    layers=LAYERS,
    rotary=(RopeSpec(16, 100.0), RopeSpec(8)),
    embedding_multiplier=3.0,
    residual_multiplier=0.7,
    logits_multiplier=0.5,
    logits_softcap=3.0,
)
OWN = QKNormSpec(kind="layer", own=True)
SLOPES = (0.5, 0.25, 0.125, 0.3)
ATTENTION = replace(
    SPEC,
    layers=(
        LayerSpec(
            replace(
                HEADS,
                alibi=SLOPES,
                sinks=True,
                gate="head",
                qk_norm=QKNormSpec(rotated=True),
                query_growth=QueryGrowth(0.5, 8),
            ),
            MLP,
        ),
        LayerSpec(replace(HEADS, alibi=SLOPES, rope=1, window=9, gate="number"), MLP),
        LayerSpec(replace(HEADS, rope=2, query_growth=QueryGrowth(0.2, 5)), MLP),
    ),
    rotary=(
        RopeSpec(16, 100.0, "yarn", 4.0, attention_factor=1.2, original_max_position_embeddings=8),
        RopeSpec(8, kind="longrope", short_factors=4 * (1.0,), long_factors=(1.0, 1.5, 2.0, 3.0)),
        RopeSpec(16, kind="proportional", pairs=3),
    ),
)
CENTRED = NormSpec(kind="layer", bias=True)
NORMS = replace(
    SPEC,
    layers=(
        LayerSpec(
            replace(
                HEADS,
                norm=CENTRED,
                qk_norm=QKNormSpec(kind="layer", bias=True),
                qkv_bias=True,
                out_bias=True,
            ),
            MLPSpec(80, norm=None, activation="gelu", gated=False, bias=True),
            parallel=True,
        ),
        LayerSpec(
            replace(HEADS, norm=NormSpec(kind="layer", gain=False), rope=1, qk_norm=OWN),
            replace(MLP, norm=replace(CENTRED, bias=False), activation="quick_gelu"),
            parallel=True,
        ),
        LayerSpec(
            replace(HEADS, norm=NormSpec(gain=False), rope=None, qk_norm=QKNormSpec(gain=False)),
            replace(MLP, activation="xielu", gated=False),
        ),
        LayerSpec(
            replace(HEADS, inner_norm=NORM, clip=0.5),
            replace(MLP, activation="relu", inner_norm=NORM),
        ),
    ),
    norm=CENTRED,
    head_bias=True,
    embedding_norm=CENTRED,
    learned_positions=CONTEXT,
)
KEPT = replace(HEADS, window=9, qk_norm=QKNormSpec(), value_norm=replace(NORM, gain=False))
SHARING = replace(
    SPEC,
    layers=(
        LayerSpec(KEPT, MLP),
        LayerSpec(replace(HEADS, head_dim=8, rope=1, keys_are_values=True), MLP, scaled=True),
        LayerSpec(replace(KEPT, shares=0), MLP),
        LayerSpec(replace(HEADS, head_dim=8, rope=1, shares=1), MLP),
    ),
    per_layer=PerLayerSpec(101, 8, activation="silu", table_multiplier=2.0, sum_multiplier=0.7),
    logits_multiplier=1.0,
)
SPECS = {"sharing": SHARING, "layers": SPEC, "attention": ATTENTION, "norms": NORMS}
# The states of Core ML are fp16, and XNNPACK guesses at tanh.
BOUND = 2e-3


def random_decoder(
    spec: DecoderSpec, form: Literal["fused", "decomposed"], longest: int = LENGTHS[-1]
) -> Decoder:
    decoder = Decoder(spec, CONTEXT, form, "all", spare=32, longest=longest)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(decoder.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        gain = "norm" in name or "scalar" in name
        values = nn.Parameter(1 + noise if gain else noise, requires_grad=False)
        setattr(decoder.get_submodule(owner), attribute, values)
    return decoder.eval()


def assert_same(runner: Runner, expected: torch.Tensor, bound: float = BOUND) -> None:
    tokens = tokens_for(97, CONTEXT)
    for seed in range(3):
        found = feed(runner, tokens, random_split(CONTEXT, LENGTHS, seed))
        assert (found - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("backend", ["fused", "decomposed", "twin"])
@pytest.mark.parametrize("options", SPECS)
def test_layers_with_all_options_are_lowered(options: str, backend: Any, tmp_path: Path) -> None:
    spec = SPECS[options]
    decoder = random_decoder(spec, "decomposed" if backend == "twin" else backend)
    expected = EagerRunner(decoder, "eager").logits(tokens_for(97, CONTEXT))
    assert expected.abs().max() > 1
    settings: dict[str, Any] = (
        {"backend": "xnnpack"}
        if backend == "twin"
        else {
            "target": "gpu" if backend == "fused" else "ane",
            "compute_precision": "fp32",
        }
    )
    config = ExportConfig(
        context=CONTEXT,
        seq_lengths=LENGTHS,
        logits="all",
        scheme="none",
        embedding="none",
        **settings,
    )
    form = form_for(resolve(config, spec), spec, 1, (2,))
    form.write(decoder, tmp_path / "model.pte")
    if backend == "twin":
        assert_same(ExecutorchRunner(tmp_path / "model.pte", form.description), expected)
        return
    # What layers share is rounded to fp16 in the states and felt in all of them, so that nothing is
    # rounded here.
    execution = Execution(mode="fp32" if spec is SHARING else "declared")
    runner = ReferenceRunner(tmp_path / "model.pte", execution)
    assert_same(runner, expected, 1e-4 if spec is SHARING else BOUND)
    (core,) = runner.programs
    states = {state.name: state.shape for state in core.states}
    assert states.keys() == form.description.states.keys()
    if spec is not SPEC:
        return
    assert states == {
        "ring_kv": (1, 4, 32, 16),
        "cache_kv": (1, 4, 96, 16),
        "cache_1_kv": (1, 2, 96, 16),
    }


@pytest.mark.parametrize(
    ("norm", "target"),
    [
        pytest.param(CENTRED, "gpu", id="layer, gpu"),
        pytest.param(CENTRED, "ane", id="layer, ane", marks=pytest.mark.exhaustive),
        pytest.param(NORM, "gpu", id="rms, gpu", marks=pytest.mark.exhaustive),
        pytest.param(NORM, "ane", id="rms, ane", marks=pytest.mark.exhaustive),
    ],
)
def test_norms_of_a_large_residual_stream_hold_in_half(
    norm: NormSpec, target: Any, tmp_path: Path
) -> None:
    layer = LayerSpec(replace(HEADS, norm=norm), replace(MLP, norm=norm), parallel=True)
    spec = replace(
        SPEC, layers=(layer,), rotary=(RopeSpec(16),), norm=norm, embedding_multiplier=6e4
    )
    decoder = random_decoder(spec, "fused" if target == "gpu" else "decomposed")
    tokens = tokens_for(97, 32)
    stream = decoder.embed(torch.tensor([tokens]))
    assert stream.abs().max() > 2e4 and (stream.half() ** 2).isinf().any()
    expected = EagerRunner(decoder, "eager").logits(tokens)
    config = ExportConfig(
        context=32, seq_lengths=(1, 8), target=target, logits="all", scheme="none", embedding="none"
    )
    form_for(resolve(config, spec), spec, 1, (2,)).write(decoder, tmp_path / "model.pte")
    found = feed(ReferenceRunner(tmp_path / "model.pte"), tokens, [8, 1, 8, 8, 1, 1, 1, 1, 1, 1, 1])
    assert ((found - expected).abs().amax(-1) / expected.abs().amax(-1)).max() < 2e-2


def test_a_ring_is_written_in_place_by_two_updates(tmp_path: Path) -> None:
    """The reference runtime finds each of them to be the state's own memory."""
    for lengths, updates in (((1, 8), 2), ((1,), 1)):
        config = ExportConfig(context=CONTEXT, seq_lengths=lengths, scheme="none", embedding="none")
        ringed = replace(SPEC, layers=LAYERS[:1])
        job = resolve(config, ringed)
        decoder = random_decoder(ringed, "fused", lengths[-1])
        form_for(job, ringed, 1, (2,)).write(decoder, tmp_path / "model.pte")
        operations = program(tmp_path / "model.pte")
        found = [op.type for op in operations.operations]
        assert found.count("slice_update") == found.count("write_state") == 2 * updates
        assert len(choose_updates(operations, frozenset()).in_place) == 2 * updates


def test_every_kind_of_state_is_written_by_both_lowerings() -> None:
    for kind in (KVCache, RingCache):
        assert kind in Cache.__subclasses__()
        assert kind.write._qualname in _TORCH_OPS_REGISTRY
        assert kind.write in WRITES


@pytest.mark.parametrize(("layer", "length", "first"), [(0, 1, 0), (2, 5, 11), (1, 8, 0)])
@pytest.mark.parametrize("write", [kv_write, ring_write])
def test_the_twin_writes_what_the_op_writes(
    write: Any, layer: int, length: int, first: int
) -> None:
    cache = torch.arange(3 * 2 * 16 * 4, dtype=torch.float32).reshape(3, 2, 16, 4)
    place = torch.tensor([first], dtype=torch.int32)
    given = [cache, -torch.ones(1, 2, length, 4), layer, place]
    given += [length] if write is ring_write else []
    assert torch.equal(WRITES[write](*given), write(*given))


@pytest.mark.parametrize(("form", "mode"), [("tanh", "TANH_APPROXIMATION"), ("none", "EXACT")])
def test_gelu_is_lowered_in_its_form(form: str, mode: str) -> None:
    """The two differ by 1e-3, which fp16 hides, and which an export's verification finds."""

    class Gelu(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x, approximate=form)

    exported = torch.export.export(Gelu(), (torch.zeros(4),)).run_decompositions({})
    program = ct.convert(
        exported,
        inputs=[ct.TensorType(shape=(4,))],
        minimum_deployment_target=ct.target.iOS18,
        convert_to="milinternal",
    )
    (found,) = program.functions["main"].find_ops(op_type="gelu")
    assert found.mode.val == mode
