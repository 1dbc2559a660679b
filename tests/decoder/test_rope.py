"""Rotary tables against the formula, and against `transformers` for every scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llm_coreml.decoder.rope import inverse_frequencies, rope_tables, rotate, table_notes
from llm_coreml.decoder.spec import RopeSpec
from llm_coreml.errors import CheckpointError
from llm_coreml.families.rotary import rope_spec

TRAINED = "original_max_position_embeddings"


def llama3(factor: float, low: float, high: float, trained: int) -> dict[str, Any]:
    bands = {"low_freq_factor": low, "high_freq_factor": high, TRAINED: trained}
    return {"rope_type": "llama3", "factor": factor, **bands}


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


FACTORS = {
    "short_factor": [1.0 + 0.01 * pair for pair in range(32)],
    "long_factor": [1.0 + 0.5 * pair for pair in range(32)],
}
FAR = 2**17
# What a file says -> the context it is asked for, whose length two of them go by.
SCALINGS: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({"rope_type": "default"}, FAR),
    "linear": ({"rope_type": "linear", "factor": 4.0}, FAR),
    "llama3-8": (llama3(8.0, 1.0, 4.0, 64), FAR),
    "llama3-32": (llama3(32.0, 2.0, 8.0, 128), FAR),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 256),
    "dynamic, beyond": ({"rope_type": "dynamic", "factor": 2.0}, FAR),
    "yarn": ({"rope_type": "yarn", "factor": 16.0, TRAINED: 4096}, FAR),
    "yarn, not truncated": (
        {"rope_type": "yarn", "factor": 32.0, "truncate": False, TRAINED: 4096},
        FAR,
    ),
    "yarn, betas": (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, TRAINED: 512},
        FAR,
    ),
    "yarn, scales": (
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
        FAR,
    ),
    "yarn, scales of 0": (
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0},
        FAR,
    ),
    "yarn, attention factor": (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "mscale": 0.7},
        FAR,
    ),
    "yarn, null factor": ({"rope_type": "yarn", "factor": None, TRAINED: 64}, FAR),
    "yarn, shrunk": ({"rope_type": "yarn", "factor": 0.5, TRAINED: 64}, FAR),
    "longrope, inside": ({"rope_type": "longrope", **FACTORS, TRAINED: 128}, 128),
    "longrope, beyond": ({"rope_type": "longrope", **FACTORS, TRAINED: 128}, FAR),
    "longrope, factor": ({"rope_type": "longrope", **FACTORS, "factor": 8.0, TRAINED: 128}, FAR),
    "longrope, attention factor": (
        {"rope_type": "longrope", **FACTORS, "attention_factor": 1.25, TRAINED: 128},
        FAR,
    ),
    "proportional": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
        FAR,
    ),
    "proportional, all": ({"rope_type": "proportional"}, FAR),
    "half a head": ({"rope_type": "default", "partial_rotary_factor": 0.5}, FAR),
    "half a head, yarn": (
        {"rope_type": "yarn", "factor": 16.0, "partial_rotary_factor": 0.5, TRAINED: 4096},
        FAR,
    ),
    "three eighths, linear": (
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.375},
        FAR,
    ),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_tables_are_those_of_transformers(scaling: str) -> None:
    from transformers import PhiConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    given, context = SCALINGS[scaling]
    given = {**given, "rope_theta": 500000.0}
    rope = rope_spec({"rope_parameters": dict(given)}, 64, 256, share=1.0)
    config = PhiConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        partial_rotary_factor=given.get("partial_rotary_factor", 1.0),
        rope_parameters=dict(given),
    )
    made = ROPE_INIT_FUNCTIONS.get(rope.kind, PhiRotaryEmbedding.compute_default_rope_parameters)
    theirs, factor = made(config, torch.device("cpu"), seq_len=context)
    # Theirs are fp32, and so is a sum within yarn: the angle is as good as that, however far.
    assert torch.allclose(inverse_frequencies(rope, context), theirs.double(), rtol=3e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    positions = torch.tensor([0, 1, 77, 1000, context - 1]).clamp(max=context - 1)
    angles = torch.outer(positions.double(), theirs.double())
    bound = factor * (3e-6 * angles + 1e-9)
    for found, wanted in zip(rope_tables(rope, context), (angles.cos(), angles.sin()), strict=True):
        assert ((found[positions] - factor * wanted).abs() <= bound).all()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_angles_are_exact_however_far(scaling: str) -> None:
    given, context = SCALINGS[scaling]
    rope = rope_spec({"rope_parameters": dict(given)}, 64, 256, share=1.0)
    cos, sin = rope_tables(rope, context)
    frequencies = inverse_frequencies(rope, context)
    assert cos.dtype == frequencies.dtype == torch.float64
    for pair in (0, len(frequencies) // 2, len(frequencies) - 1):
        angle = (context - 1) * float(frequencies[pair])
        assert float(cos[-1, pair]) == pytest.approx(rope.attention_factor * math.cos(angle))
        assert float(sin[-1, pair]) == pytest.approx(rope.attention_factor * math.sin(angle))


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


def test_what_goes_by_the_context_is_told() -> None:
    dynamic = RopeSpec(16, kind="dynamic", factor=2.0, original_max_position_embeddings=128)
    factors = {"short_factors": 8 * (1.0,), "long_factors": 8 * (2.0,)}
    longrope = RopeSpec(16, kind="longrope", original_max_position_embeddings=128, **factors)
    plain = RopeSpec(16)
    assert table_notes((plain, dynamic), 128) == []
    (told,) = table_notes((plain, dynamic, dynamic), 160)
    assert told == (
        "RoPE turns by the angles that dynamic scaling has for the whole context of 160; "
        "transformers has others for shorter texts, and unscaled ones up to 128 tokens."
    )
    assert table_notes((longrope,), 160) == [
        "RoPE takes the long factors of longrope for the whole context of 160; transformers takes "
        "the short ones for texts up to 128 tokens."
    ]
    assert table_notes((longrope,), 128) == [
        "RoPE takes the short factors of longrope for the whole context of 128; transformers "
        "takes the long ones for texts beyond 128 tokens."
    ]


def test_how_far_a_scaling_reaches() -> None:
    assert RopeSpec(16).reach(256) == 256
    assert RopeSpec(16, kind="linear", factor=2.5).reach(256) == 640
    assert RopeSpec(16, kind="dynamic", factor=2.0).reach(256) == 512
    yarn = RopeSpec(16, kind="yarn", factor=4.0, original_max_position_embeddings=256)
    assert yarn.reach(256) == yarn.reach(1024) == 1024
    assert RopeSpec(16, kind="llama3", factor=8.0).reach(256) == 256


@pytest.mark.parametrize("dim", [0, -2, 3, True, 2.0])
def test_what_cannot_be_rotated_in_pairs_is_refused(dim: Any) -> None:
    with pytest.raises(CheckpointError, match=f"head_dim = {dim}; "):
        RopeSpec(dim)


def test_factors_are_as_many_as_pairs() -> None:
    given = {"rope_type": "longrope", **FACTORS}
    with pytest.raises(CheckpointError, match=r"gives 32 numbers in short_factor .* and 16 pairs"):
        rope_spec({"rope_parameters": given}, 64, 256, share=0.5)


def test_one_pair_has_no_base() -> None:
    rope = RopeSpec(2, kind="dynamic", factor=2.0, original_max_position_embeddings=128)
    assert inverse_frequencies(rope, 256).tolist() == [1.0]
