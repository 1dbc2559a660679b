"""GGUF files of every architecture that is read, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from cases import cases
from family_table import their_model, write_config
from gguf_converter import as_theirs, convert, rounded
from llm_coreml import load
from llm_coreml.checkpoint.gguf_architectures import ARCHITECTURES
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.families import find_family, known_model_types
from llm_coreml.model import open_model
from llm_coreml.pipeline import export
from llm_coreml.quantize.plan.choose import plan_for
from llm_coreml.quantize.plan.imported import import_report
from llm_coreml.quantize.quantized import build_decoder
from llm_coreml.runtime.eager import EagerRunner
from tiny import expected_logits, tokens_for

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(6)],
    "long_factor": [2.0 + index for index in range(6)],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
ALPHA = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
MULTIPLIERS = {"residual_multiplier": 0.6, "attention_multiplier": 0.4, "logits_scaling": 0.25}
HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16}
SIX_LAYERS = {"num_hidden_layers": 6, **HEADS}
# What beside the sizes of the table shows that a number is read; families as they are built.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {"attention_bias": True}),
    "arcee": ("arcee", {"attention_bias": True, "mlp_bias": True}),
    "bloom": ("bloom", {"seq_length": 128}),
    "chatglm": ("glm", {"head_dim": 16, "attention_bias": True}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "sliding_window": 9, "logit_scale": 0.5}),
    "command-r": ("cohere", {"logit_scale": 0.5, "tie_word_embeddings": True}),
    "ernie4_5": ("ernie4_5", {"use_bias": True, "tie_word_embeddings": True}),
    "exaone4": ("exaone4", {"num_hidden_layers": 4, "sliding_window": 9}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "gemma": ("gemma", {"tie_word_embeddings": True, "head_dim": 24}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 9, **CAPS, **HEADS}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 9, **SIX_LAYERS}),
    "gemma4": ("gemma4_text", {"num_kv_shared_layers": 3, "use_double_wide_mlp": True}),
    "glm4": ("glm4", {"attention_bias": True}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "gptneox": ("gpt_neox", {"attention_bias": True}),
    "granite": ("granite", {"embedding_multiplier": 3.0, **MULTIPLIERS}),
    "hunyuan-dense": ("hunyuan_v1_dense", {"rope_scaling": ALPHA}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral3": ("ministral3", {"rope_parameters": YARN}),
    "nemotron": ("nemotron", {"attention_bias": True, "mlp_bias": True, "norm_eps": 1e-3}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "phi2": ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "phi3": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": False}),
    "starcoder": ("gpt_bigcode", {}),
    "starcoder2": ("starcoder2", {"use_bias": True, "sliding_window": None}),
}
BUILT = sorted(name for name, (family, _) in FAMILIES.items() if family in known_model_types())


def test_every_architecture_is_tried() -> None:
    known = {name: each.model_type for name, each in ARCHITECTURES.items()}
    built = {name for name, family in known.items() if family in known_model_types()}
    assert built - FAMILIES.keys() == set(), "give each an entry here"


def made(folder: Path, architecture: str, kind: Kind = Kind.F32) -> tuple[Any, dict[str, Any]]:
    """Write a model's `config.json` apart, its GGUF file in `folder`; return it and its values."""
    family, changes = FAMILIES[architecture]
    apart = folder / "apart"
    apart.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    write_config(apart, family, {**sizes, **changes})
    theirs = their_model(apart)
    meant = convert(folder / "model.gguf", architecture, theirs, kind)
    return theirs, meant


@pytest.mark.parametrize("architecture", BUILT)
def test_a_file_alone_is_the_model_that_it_was_made_of(architecture: str, tmp_path: Path) -> None:
    theirs, meant = made(tmp_path, architecture)
    model = open_model(tmp_path / "model.gguf")
    config = theirs.config.to_dict()
    spec = find_family(config).spec(config)
    assert rounded(model.spec) == rounded(spec)
    assert model.checkpoint.names() == meant.keys()
    for name, values in meant.items():
        found = model.checkpoint.tensor(name, torch.float32)
        # Gains that are stored plus one have lost their last bits there.
        assert torch.allclose(found, values, rtol=0, atol=2e-7 if "norm" in name else 0), name


@pytest.mark.parametrize("architecture", BUILT)
def test_codes_are_taken_as_they_are(architecture: str, tmp_path: Path) -> None:
    _, meant = made(tmp_path, architecture, Kind.Q8_0)
    model = open_model(tmp_path / "model.gguf")
    forms, weights = model.weights.forms(), model.weights
    assert len(forms) > 6 and {form.label for form in forms.values()} == {"GGUF Q8_0"}
    stored = model.family.stored(model.spec)
    for name in forms:
        packed = weights.packed(name)
        assert packed is not None
        if stored[name].values is None:
            (theirs,) = stored[name].names
            values = weights.tensor(name, torch.float32)
            assert torch.equal(values, meant[theirs]), name


EXPORT = ExportConfig(context=32, seq_lengths=(1, 8), logits="all")
EXPORTED = ("phi3", "gemma4", "gpt2")  # fused matrices; tables of layers; transposed ones


@pytest.mark.parametrize("architecture", cases(EXPORTED, EXPORTED[1:]))
def test_a_file_alone_exports(architecture: str, tmp_path: Path) -> None:
    theirs, meant = made(tmp_path, architecture, Kind.Q8_0)
    bundle = export(tmp_path / "model.gguf", output=tmp_path / "out", config=EXPORT, cache=False)
    report = bundle.manifest.quantization.imported
    assert report is not None and report.exactness == "exact"
    assert error_of(load(bundle.folder).logits, theirs, meant) < 0.02


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", sorted(set(BUILT) - set(EXPORTED)))
def test_a_file_alone_is_quantized_to_what_is_lowered(architecture: str, tmp_path: Path) -> None:
    """How it is lowered, `test_lowered_families.py` shows of each family."""
    theirs, meant = made(tmp_path, architecture, Kind.Q8_0)
    model = open_model(tmp_path / "model.gguf")
    report, job = import_report(model.checkpoint), resolve(EXPORT, model.spec)
    assert report is not None and report.exactness == "exact"
    decoder = build_decoder(model, job, plan_for(job, model))
    # Gains, biases and what is not quantized are fp16 already, sums are not.
    assert error_of(EagerRunner(decoder, "eager").logits, theirs, meant) < 0.01


def error_of(
    ours: Callable[[list[int]], torch.Tensor], theirs: Any, meant: dict[str, torch.Tensor]
) -> float:
    """Return how far our logits are from those of the model of a file's values, of the largest."""
    theirs.load_state_dict(as_theirs(meant), strict=False)
    tokens = tokens_for(97, 24)
    expected = expected_logits(theirs, tokens)
    return float((ours(tokens) - expected).abs().max() / expected.abs().max())


# Those that transformers reads itself, heads of another width than the usual left out.
THEIRS = ("qwen2", "gemma2", "gemma3", "phi3", "starcoder2", "stablelm", "nemotron")


@pytest.mark.parametrize(
    "architecture", cases([name for name in THEIRS if name in BUILT], set(BUILT) & set(THEIRS[1:]))
)
def test_transformers_reads_the_same(architecture: str, tmp_path: Path) -> None:
    # What it reads GGUF with, and nothing else here needs.
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    made(tmp_path, architecture)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    model = open_model(tmp_path / "model.gguf")
    state = theirs.state_dict()
    # It knows of biases by its configurations alone, which a file does not have.
    known = [name for name in model.checkpoint.names() if name in state or ".bias" not in name]
    for name in known:
        assert torch.equal(model.checkpoint.tensor(name, torch.float32), state[name]), name
