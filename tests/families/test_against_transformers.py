"""The decoder computes what `transformers` computes, through folder, family and loader.

Both sides run fp32 on random weights whose logits reach several units; the bound is absolute.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from family_table import CASES, TABLE, checkpoint, their_model, write_config
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder
from llm_coreml.decoder.norm import take_form
from llm_coreml.families import known_model_types
from llm_coreml.model import Model, open_model
from llm_coreml.quantize import make_plan
from llm_coreml.quantize.fill import fill
from llm_coreml.quantize.quantized import build_decoder, build_original
from llm_coreml.targets import NormForm, Operations
from tiny import expected_logits, llama, random_split, save, tokens_for

CONTEXT = 64
BOUND = 1e-4
SPLITS = {
    "whole": [CONTEXT],
    "chunks": [1, 8, 3, 32, 1, 7, 12],
    "one-by-one": [1] * CONTEXT,
}


def run(decoder: Decoder, tokens: Sequence[int], parts: Sequence[int]) -> torch.Tensor:
    """Feed `tokens` in chunks of the lengths `parts`; returns the rows of all calls."""
    rows, start = [], 0
    decoder.reset()
    with torch.inference_mode():
        for length in parts:
            chunk = torch.tensor([list(tokens[start : start + length])])
            rows.append(decoder(chunk, torch.tensor([start]))[0])
            start += length
    return torch.cat(rows)


def build(
    model: Model,
    attention: Literal["fused", "decomposed"],
    logits: Literal["last", "all"],
    longest: int | None = None,
    operations: Operations = "usual",
) -> Decoder:
    decoder = Decoder(
        model.spec, CONTEXT, attention, logits, longest=longest, operations=operations
    )
    fill(decoder, model.weights, plan=None, storage=None)
    return decoder.eval()


@pytest.mark.parametrize(("family", "case"), CASES)
def test_every_family_in_every_split(family: str, case: str, tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, family, TABLE[family].cases[case])
    tokens = tokens_for(97, CONTEXT)
    expected = expected_logits(reference, tokens)
    assert expected.abs().max() > 1, "tiny logits would hide differences"
    model = open_model(tmp_path)
    for attention in ("fused", "decomposed"):
        decoder = build(model, attention, "all")
        for name, parts in SPLITS.items():
            error = (run(decoder, tokens, parts) - expected).abs().max()
            assert error < BOUND, f"{attention}, {name}: {error}"
    decoder = build(model, "decomposed", "all", operations="fewest")
    for form in get_args(NormForm):
        take_form(decoder, form, torch.float32)
        error = (run(decoder, tokens, SPLITS["whole"]) - expected).abs().max()
        assert error < BOUND, f"fewest operations, norms as {form}: {error}"
    windows = [layer.mixer.window for layer in model.spec.layers]
    ringed = build(model, "fused", "all", longest=8)
    rings = any(state.ring for state in ringed.states.values())
    assert rings == any(window and window <= 24 for window in windows)
    if rings:
        for parts in (SPLITS["one-by-one"], *(random_split(CONTEXT, (1, 3, 8), n) for n in (0, 1))):
            error = (run(ringed, tokens, parts) - expected).abs().max()
            assert error < BOUND, f"in rings, {parts}: {error}"


def test_every_family_has_its_lines() -> None:
    assert set(TABLE) == set(known_model_types())
    assert all(len(entry.cases) >= 3 for entry in TABLE.values())


@pytest.mark.parametrize("parts", SPLITS.values(), ids=SPLITS)
def test_last_logits_are_the_last_row_of_each_chunk(parts: list[int], tmp_path: Path) -> None:
    reference = llama(num_hidden_layers=2)
    tokens = tokens_for(97, CONTEXT)
    ends = torch.tensor(parts).cumsum(0) - 1
    rows = run(build(open_model(save(reference, tmp_path)), "fused", "last"), tokens, parts)
    assert rows.shape == (len(parts), 97)
    assert (rows - expected_logits(reference, tokens)[ends]).abs().max() < BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_checkpoints_compute_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    narrow = llama(num_hidden_layers=2, attention_bias=True).to(dtype)
    model = open_model(save(narrow, tmp_path, max_shard_size="60KB"))
    # Read again rather than widened: `to` has rounded the model's RoPE frequencies as well.
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = tokens_for(97, CONTEXT)
    decoder = build_original(model, CONTEXT)
    stored = decoder.get_parameter("layers.0.mlp.gate_proj.weight")
    assert stored.dtype == dtype, "weights stay 16 bits wide"
    decoder.logits = "all"
    error = (run(decoder, tokens, [40, 24]) - expected_logits(reference, tokens)).abs()
    assert error.max() < BOUND


def test_build_decoder_unquantized_in_fp32(tmp_path: Path) -> None:
    reference = llama(tie_word_embeddings=True)
    model = open_model(save(reference, tmp_path))
    config = ExportConfig(
        scheme="none",
        embedding="none",
        compute_precision="fp32",
        logits="all",
        target="ane",
        context=32,
    )
    job = resolve(config, model.spec)
    decoder = build_decoder(model, job, make_plan(job, model.spec))
    assert job.shapes.context == 32
    tokens = tokens_for(97, 32)
    error = (run(decoder, tokens, [8, 24]) - expected_logits(reference, tokens)).abs().max()
    assert error < BOUND


@pytest.mark.parametrize("family", TABLE)
def test_a_live_model_needs_no_folder(family: str, tmp_path: Path) -> None:
    write_config(tmp_path, family, next(iter(TABLE[family].cases.values())))
    reference = their_model(tmp_path)
    tokens = tokens_for(97, CONTEXT)
    decoder = build(open_model(reference), "fused", "all")
    error = (run(decoder, tokens, [CONTEXT]) - expected_logits(reference, tokens)).abs().max()
    assert error < BOUND


@pytest.mark.parametrize("family", TABLE)
def test_a_checkpoint_of_the_inner_model_alone_is_read(family: str, tmp_path: Path) -> None:
    """As the first GPT-2 and BLOOM were saved: no name says that it is inside of a causal LM."""
    source, bare = tmp_path / "whole", tmp_path / "inner"
    for folder in (source, bare):
        folder.mkdir()
    checkpoint(source, family, next(iter(TABLE[family].cases.values())))
    whole = open_model(source)
    tensors = load_file(source / "model.safetensors")
    (table,) = whole.family.stored(whole.spec)["embed_tokens.weight"].names
    front = table.partition(".")[0] + "."
    renamed = {name.removeprefix(front): tensor for name, tensor in tensors.items()}
    shutil.copy(source / "config.json", bare)
    save_file(renamed, bare / "model.safetensors", {"format": "pt"})
    read = open_model(bare)
    assert read.spec == whole.spec
    for name in whole.weights.names():
        found, wanted = (each.weights.tensor(name, torch.float32) for each in (read, whole))
        assert torch.equal(found, wanted), name
