"""Linear layers, heads and tables in parts: the sums of the whole ones, and the same weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from artifacts import Artifact, lower, program, weight_bytes
from cases import cases
from llm_coreml.artifact.mil import NamedType, TensorType
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.cuts import Cuts
from llm_coreml.decoder.states import state_specs
from llm_coreml.errors import ConfigError, UnsupportedError, VerificationError
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.reference import ReferenceRunner
from llm_coreml.verify.logits import verify, verify_conversion
from llm_coreml.verify.passes import plan_passes
from llm_coreml.verify.reading import read_text
from tiny import expected_logits, llama, mistral, small_spec, tokens_for

SIZES: dict[str, Any] = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
PARTS: dict[str, Any] = {"linear_split": 32, "head_split": 64, "gather_split": 100}
# What a matrix is stored as, and how it is cut.
CASES: dict[str, dict[str, Any]] = {
    "palettes": {
        "bits": 4,
        "scheme": "codebook",
        "target": "ane",
        "norm": "layer",
        "operations": "fewest",
    },
    "grouped": {"scheme": "int4-group", "embedding": "int4-group"},
    "per channel, tied": {
        "scheme": "int4-channel",
        "tied": True,
        "gather_split": 32,
        "norm": "l2",
    },
    "plain fp32, biases": {"scheme": "none", "compute_precision": "fp32", "biases": True},
    "tables of half a matrix": {
        "scheme": "codebook:3",
        "codebook_rows": 32,
        "embedding": "codebook:4",
    },
    "vectors": {
        "scheme": "codebook:2",
        "codebook_vector": 4,
        "minimum_os": "iOS26",
        "operations": "fewest",
    },
    "topk, window": {"scheme": "int8-channel", "head": "topk:6", "window": 7},
    "caches that are given": {"scheme": "int8-channel", "kv_cache": "inputs"},
}
CASES |= {
    "conv, palettes": {**CASES["palettes"], "layout": "conv"},
    "conv, grouped, every row": {**CASES["grouped"], "layout": "conv", "logits": "all"},
    "conv, plain fp32, biases": {**CASES["plain fp32, biases"], "layout": "conv"},
    "conv, vectors": {**CASES["vectors"], "layout": "conv"},
    "conv, topk, window": {
        **CASES["topk, window"],
        "layout": "conv",
        "pad_heads": True,
        "norm": "l2",
    },
    "padded, given caches": {**CASES["caches that are given"], "pad_heads": True},
}
FURTHER = (
    *("conv, plain fp32, biases", "conv, vectors", "padded, given caches"),
    *("tables of half a matrix", "vectors", "caches that are given"),
)
BOUND = 2e-5
CONTEXT = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    folder = tmp_path_factory.mktemp("cuts")

    @functools.cache
    def make(name: str) -> Artifact:
        settings = {**PARTS, "context": CONTEXT, "seq_lengths": (1, 8), **CASES[name]}
        model = model_for(settings)
        return lower(model, ExportConfig(**settings), folder / f"{name}.pte")

    return make


def model_for(settings: dict[str, Any]) -> Any:
    """Return a model, and take what is about it out of the settings."""
    window, biases = settings.pop("window", None), settings.pop("biases", False)
    tied = settings.pop("tied", False)
    if window is not None:
        kinds = ["sliding_attention", "full_attention"]
        return mistral(**SIZES, sliding_window=window, layer_types=kinds)
    return llama(**SIZES, attention_bias=biases, mlp_bias=biases, tie_word_embeddings=tied)


@pytest.mark.parametrize("name", cases(CASES, FURTHER))
def test_parts_give_what_the_whole_gives(name: str, made: Callable[[str], Artifact]) -> None:
    """Past the window, and at the last position; without rounding, and as it is declared."""
    artifact = made(name)
    tokens = tokens_for(SIZES["vocab_size"], CONTEXT)
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    expected = expected if artifact.job.logits == "all" else expected[7::8]
    for mode, bound in (("fp32", BOUND), ("declared", 2e-2)):
        runner = ReferenceRunner(artifact.path, Execution(mode=mode))
        rows = torch.cat([runner.step(tokens[at : at + 8]) for at in range(0, CONTEXT, 8)])
        count = runner.head.count or rows.shape[1]
        found = rows.topk(count).values, expected.topk(count).values
        assert float((found[0] - found[1]).abs().max() / expected.abs().max()) < bound


def dtype_of(value: NamedType) -> str | None:
    return value.type.dtype if isinstance(value.type, TensorType) else None


@pytest.mark.parametrize("name", cases(CASES, FURTHER))
def test_nothing_is_wider_than_it_may_be(name: str, made: Callable[[str], Artifact]) -> None:
    artifact = made(name)
    operations = program(artifact.path).operations
    sizes = {output.name: output.type for op in operations for output in op.outputs}
    ranks = [kind for kind in sizes.values() if isinstance(kind, TensorType)]
    rows, tables = [], []
    for op in operations:
        held = {"linear": "weight", "conv": "weight", "gather": "x"}.get(op.type)
        if held is not None:
            (weight,) = op.inputs[held]
            kind = sizes[weight] if isinstance(weight, str) else weight.type
            assert isinstance(kind, TensorType)
            shape = kind.shape
            (tables if op.type == "gather" else rows).append(shape[0])
            assert max(map(len, (shape, *(kind.shape for kind in ranks)))) <= 5
    assert max(rows) <= 64 and max(tables) <= 100
    # q 64, k 32, v 32, o 64, gate 160, up 160, down 64; 160 in whole tables of 32 or 16 rows.
    layer = 2 + 1 + 1 + 2 + 5 + 5 + 2
    assert len(rows) == 2 * layer + 6
    kinds = [op.type for op in operations]
    assert kinds.count("topk") == (7 if "head" in CASES[name] else 0)
    assert ("linear" in kinds) == ("layout" not in CASES[name])
    computed = [op for op in operations if op.type != "const"]
    wide = [op.type for op in computed if "fp32" in {dtype_of(each) for each in op.outputs}]
    # Nothing is computed in fp32 in a program of fp16, its logits among the rest.
    assert artifact.job.precision.name == "fp32" or not wide
    # Masks are -40000, no infinite number is anywhere, nor is there a third state.
    held = [op.attributes["val"].value() for op in operations if op.type == "const"]
    numbers = [value for value in held if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    assert all(np.isfinite(value).all() for value in numbers)
    assert min(float(value.min()) for value in numbers if value.size) == -40000
    assert len(state_specs(artifact.decoder.spec, artifact.shapes.extent)) == 2
    for state in state_specs(artifact.decoder.spec, artifact.shapes.extent):
        assert state.shape[-1] == (32 if "pad_heads" in CASES[name] else 16)


def test_parts_are_verified_as_the_weights_they_are(
    made: Callable[[str], Artifact], tmp_path: Path
) -> None:
    for name in ("grouped", "per channel, tied", "conv, topk, window"):
        artifact = made(name)
        plan = plan_passes((1, 8), CONTEXT)
        tokens = tokens_for(SIZES["vocab_size"], plan.tokens)
        settings = {"every_row": False, "natural": True, "in_fp16": True, "cuts": artifact.job.cuts}
        reading = read_text(artifact.decoder, tokens, "random tokens", plan, **settings)
        unrounded = ReferenceRunner(artifact.path, Execution(mode="fp32"))
        assert verify_conversion(unrounded, artifact.decoder, reading).passed
        assert verify(ReferenceRunner(artifact.path), reading).passed
    # Rows in another order are other weights, whatever the logits are.
    settings["cuts"] = Cuts(linear=32)
    other = read_text(artifact.decoder, tokens, "random tokens", plan, **settings)
    with pytest.raises(VerificationError, match=r"which is none of the model's|is not in the prog"):
        verify_conversion(unrounded, artifact.decoder, other)


def test_a_program_in_parts_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    model, tokens = llama(**SIZES), tokens_for(SIZES["vocab_size"], CONTEXT)
    settings = {"context": CONTEXT, "seq_lengths": (1, 8), "scheme": "none", **PARTS}
    config = ExportConfig(**settings, compute_precision="fp32", logits="all")
    path = lower(model, config, tmp_path / "model.pte").path
    rows = ReferenceRunner(path, Execution(mode="fp32")).logits(tokens)
    wanted = expected_logits(model, tokens)
    assert float((rows - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_equal_parts_exist_once(made: Callable[[str], Artifact], tmp_path: Path) -> None:
    """A tied head and its table, cut alike, are stored once; cut otherwise they would be twice."""
    settings = {**CASES["per channel, tied"], **PARTS, "context": CONTEXT, "seq_lengths": (1, 8)}
    model = model_for(settings)
    apart = lower(model, ExportConfig(**settings), tmp_path / "apart.pte")
    table = SIZES["vocab_size"] * SIZES["hidden_size"]  # int8
    saved = weight_bytes(apart.path) - weight_bytes(made("per channel, tied").path)
    assert 0.9 * table < saved < 1.2 * table


@pytest.mark.parametrize(
    ("rows", "unit", "cuts", "bounds"),
    [
        (8192, 16, Cuts(1024), list(range(0, 8193, 1024))),
        (14336, 16, Cuts(1024), list(range(0, 14337, 1792))),
        (1536, 1, Cuts(1024), [0, 1536]),
        (512, 1, Cuts(1024), [0, 512]),
        (128256, 1, Cuts(1024, 16384), list(range(0, 128257, 16032))),
        # In whole blocks of 48, of which 21 are not wider than 1024.
        (2400, 48, Cuts(1024), [0, 1200, 2400]),
        (2400, 48, Cuts(widest=1024), [0, 768, 1584, 2400]),
        (100, 100, Cuts(32, 64), [0, 100]),
    ],
)
def test_where_a_layer_is_cut(rows: int, unit: int, cuts: Cuts, bounds: list[int]) -> None:
    assert cuts.of_linear(rows, unit) == bounds


def test_older_systems_have_no_parts_of_packed_weights() -> None:
    with pytest.raises(UnsupportedError, match=r"--linear-split, .* from iOS18"):
        lower(
            llama(**SIZES),
            ExportConfig(minimum_os="iOS17", kv_cache="inputs", linear_split=32),
            Path("/nowhere"),
        )


@pytest.mark.parametrize(
    ("name", "attention", "norm"),
    [("ane-ios18", "fused", "layer"), ("ane-ios26", "decomposed", "l2")],
)
def test_a_profile_is_what_is_not_given(name: Any, attention: str, norm: str) -> None:
    spec = small_spec()
    job = resolve(ExportConfig(target="ane", profile=name), spec)
    # No layer norm in a program of several lengths.
    assert job.norm == "l2" and job.operations == "fewest"
    for one in ({"seq_lengths": (8,)}, {"functions": "prefill:8,decode:1"}):
        assert resolve(ExportConfig(target="ane", profile=name, **one), spec).norm == norm
    assert resolve(ExportConfig(target="ane", profile=name, norm="scaled"), spec).norm == "scaled"
    assert job.cuts == Cuts(1024, 16384, 16384) and job.attention == attention
    assert job.shapes.extent.multiple == 32 and job.layout == "linear"
    own = resolve(ExportConfig(target="ane", profile=name, linear_split=512), spec)
    assert own.cuts == Cuts(512, 16384, 16384)
    with pytest.raises(ConfigError, match=f"--profile {name} is for the Neural Engine"):
        resolve(ExportConfig(profile=name), spec)


def test_fused_attention_is_not_for_ios26() -> None:
    config = ExportConfig(target="ane", profile="ane-ios18", minimum_os="iOS26")
    with pytest.raises(ConfigError, match="executorch issue 15833"):
        resolve(config, small_spec())
    with pytest.raises(ConfigError, match="about Core ML"):
        resolve(ExportConfig(backend="xnnpack", layout="conv"), small_spec())
