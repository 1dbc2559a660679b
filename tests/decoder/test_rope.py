"""Rotary tables against the formula, and against `transformers` for every scaling."""

from __future__ import annotations

import math

import pytest
import torch

from llm_coreml.decoder.rope import inverse_frequencies, rope_tables, rotate
from llm_coreml.decoder.spec import RopeSpec
from llm_coreml.errors import UnsupportedError


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 16, 48, 128])
def test_tables_hold_the_angle_of_every_position(theta: float, head_dim: int) -> None:
    context = 512
    cos, sin = rope_tables(RopeSpec(head_dim, theta=theta), context)
    assert cos.shape == sin.shape == (context, head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float64
    for position in (0, 1, 77, context - 1):
        for pair in (0, head_dim // 4, head_dim // 2 - 1):
            angle = position * math.pow(theta, -2 * pair / head_dim)
            assert float(cos[position, pair]) == pytest.approx(math.cos(angle), abs=1e-12)
            assert float(sin[position, pair]) == pytest.approx(math.sin(angle), abs=1e-12)


@pytest.mark.parametrize(
    "rope",
    [
        RopeSpec(64, kind="linear", factor=4.0, original_max_position_embeddings=256),
        RopeSpec(64, 500000.0, "llama3", 8.0, 1.0, 4.0, 64),
        RopeSpec(64, 500000.0, "llama3", 32.0, 2.0, 8.0, 128),
        RopeSpec(64, kind="dynamic", original_max_position_embeddings=256),
    ],
    ids=["linear", "llama3-8", "llama3-32", "dynamic"],
)
def test_scaled_frequencies_are_those_of_transformers(rope: RopeSpec) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": rope.kind,
        "rope_theta": rope.theta,
        "factor": 2.0 if rope.kind == "dynamic" else rope.factor,
    }
    if rope.kind == "llama3":
        parameters["low_freq_factor"] = rope.low_freq_factor
        parameters["high_freq_factor"] = rope.high_freq_factor
        parameters["original_max_position_embeddings"] = rope.original_max_position_embeddings
    config = LlamaConfig(head_dim=64, max_position_embeddings=256, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    ours = inverse_frequencies(rope)
    assert torch.allclose(ours.to(torch.float32), theirs, rtol=2e-6, atol=0)


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    rope = RopeSpec(64, 500000.0, "llama3", 8.0, 1.0, 4.0, 256)
    plain = inverse_frequencies(RopeSpec(64, theta=500000.0))
    ratio = plain / inverse_frequencies(rope)
    assert float(ratio[0]) == 1.0
    assert float(ratio[-1]) == pytest.approx(8.0)
    assert ((ratio > 1.001) & (ratio < 7.999)).any(), "some frequencies lie between"


def test_rotation_turns_pairs_half_a_head_apart() -> None:
    x = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    x[..., 1] = 1.0
    angle = torch.tensor(0.3, dtype=torch.float64)
    found = rotate(x, angle.cos().expand(1, 1, 4), angle.sin().expand(1, 1, 4))
    expected = torch.zeros_like(x)
    expected[..., 1], expected[..., 5] = angle.cos(), angle.sin()
    assert torch.allclose(found, expected)


def test_dynamic_tables_end_at_the_trained_length() -> None:
    rope = RopeSpec(16, kind="dynamic", original_max_position_embeddings=128)
    assert rope_tables(rope, 128)[0].shape == (128, 8)
    with pytest.raises(UnsupportedError, match="use --context 128 or less"):
        rope_tables(rope, 160)
