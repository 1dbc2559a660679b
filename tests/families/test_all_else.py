"""Every part of a family through all that an export has beside formats.

What a family needs is data of its layers' specs, so none of this knows a family. A test here fails
where a new part of a spec was given to the decoder, and not to calibration, tuning, rotation, mixed
formats, the evaluators or the twin.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import cases
from family_table import TABLE, checkpoint, write_config
from llm_coreml import load
from llm_coreml.config import ExportConfig, resolve
from llm_coreml.decoder import Decoder, DecoderSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.eval.difference import diff
from llm_coreml.eval.inspection import inspect_numerics
from llm_coreml.families import find_family, known_model_types
from llm_coreml.fidelity import kl_divergence
from llm_coreml.model import Model, open_model
from llm_coreml.pipeline import export
from llm_coreml.progress import Silent
from llm_coreml.quantize.quantized import Quantized, build_original, quantize
from llm_coreml.recipes import bundled_model
from llm_coreml.reference.program.execution import Execution
from tiny import expected_logits, tokens_for

VOCABULARY = json.loads((bundled_model() / "config.json").read_text())["vocab_size"]
TOKENIZER = bundled_model() / "tokenizer.json"
CONTEXT = 32
USUAL: dict[str, Any] = {"context": CONTEXT, "seq_lengths": (1, 8), "group_size": 16}
TEXT: dict[str, Any] = {"calibrate": "bundled", "calibration_tokens": 128}
UNROUNDED = Execution(mode="fp32")
FAMILIES = cases(known_model_types(), [name for name in known_model_types() if name != "llama"])
# With `llama`, what has most of the parts of a spec: exports of every family would take long.
_PARTS = [
    "bloom",
    "cohere2",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gpt2",
    "granite_swa",
    "ministral3",
    "nanochat",
    "olmo2",
    "phi3",
    "qwen3",
    "smollm3",
]
EXPORTED = cases(["llama", *_PARTS], _PARTS)
_FURTHER = [*_PARTS, "apertus", "biogpt", "ctrl", "gemma4_unified_text", "openai-gpt", "persimmon"]
QUANTIZED = cases(["llama", *_FURTHER], _FURTHER)
# `test_lowered_options.py` lowers each part for XNNPACK, `test_demo.py` a llama: here are slopes,
# and tables of layers.
_TWINS = {"bloom", "gemma4_text"}


def test_the_table_has_every_family() -> None:
    assert TABLE.keys() == set(known_model_types())


def made(folder: Path, family: str) -> tuple[Any, Model]:
    """Write a family's first model with a vocabulary that text can be read with."""
    first = next(iter(TABLE[family].cases.values()))
    folder.mkdir(exist_ok=True)
    sizes = {"vocab_size": VOCABULARY}
    if "vocab_size_per_layer_input" in TABLE[family].sizes:
        sizes["vocab_size_per_layer_input"] = VOCABULARY
    theirs = checkpoint(folder, family, {**first, **sizes})
    shutil.copy(TOKENIZER, folder)
    return theirs, open_model(folder)


def quantized(model: Model, **settings: Any) -> Quantized:
    config = ExportConfig(**{**USUAL, **settings})
    return quantize(model, resolve(config, model.spec), TOKENIZER, Silent())


def refusals(spec: DecoderSpec) -> set[str]:
    """Return what cannot be rotated, for norms of what is written or means of what is read."""
    parts = [part for layer in spec.layers for part in (layer.mixer, layer.feed_forward)]
    if any(layer.mixer.value_norm is not None for layer in spec.layers):
        return {"residual", "heads"}
    if any(layer.mixer.inner_norm is not None for layer in spec.layers):
        return {"heads"}
    if any(part.out_norm is not None for part in parts):
        return {"residual"}
    norms = [norm for norm in (spec.norm, *(part.norm for part in parts)) if norm is not None]
    return {"residual"} if any(norm.kind == "layer" for norm in norms) else set()


def rows(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    decoder.logits = "all"
    decoder.reset()
    with torch.inference_mode():
        found: torch.Tensor = decoder(torch.tensor([tokens]), torch.tensor([0]))[0]
    return found.float()


def parts(value: Any, where: str = "") -> set[str]:
    """Return which fields a spec has below it, with their values where these are no numbers."""
    if is_dataclass(value):
        owner, own = type(value).__name__, fields(value)
        kept = [field.name for field in own if field.name != "model_type"]
        return set().union(*(parts(getattr(value, name), f"{owner}.{name}") for name in kept))
    if isinstance(value, tuple):
        return set().union(*(parts(each, where) for each in value))
    return {f"{where}={value}" if value is None or isinstance(value, (bool, str)) else where}


def test_every_part_is_in_a_family_that_is_quantized(tmp_path: Path) -> None:
    found = {}
    for family, entry in TABLE.items():
        config = write_config(tmp_path, family, next(iter(entry.cases.values())))
        found[family] = parts(find_family(config).spec(config))
    shown = set().union(*(found[name] for name in ("llama", *_FURTHER)))
    assert set().union(*found.values()) - shown == set(), "add a family with it to `_FURTHER`"


@pytest.mark.parametrize("family", QUANTIZED)
def test_calibration_tuning_and_mixed_formats(family: str, tmp_path: Path) -> None:
    _, model = made(tmp_path, family)
    calibrated = quantized(model, bits=4, tune=2, **TEXT)
    assert calibrated.tuning is not None and calibrated.tuning.after <= calibrated.tuning.before
    assert calibrated.calibration is not None
    windows = [list(window) for window in calibrated.calibration.windows]
    original = build_original(model, CONTEXT)
    wanted = [rows(original, window) for window in windows]

    def lost(found: Quantized) -> float:
        """Return the mean divergence on the text that codes were chosen on."""
        losses = [
            kl_divergence(theirs, rows(found.decoder, window))
            for theirs, window in zip(wanted, windows, strict=True)
        ]
        return float(torch.cat(losses).mean())

    mixed = quantized(model, bits=3.5)
    # As codes of so many bits leave it, and not as another model does.
    assert lost(calibrated) < lost(quantized(model, bits=4))
    assert lost(mixed) < 1.2 * lost(quantized(model, bits=3))
    assert mixed.measured is not None and all(loss >= 0 for loss in mixed.measured.losses.values())
    assert len({mixed.plan.scheme_of(name) for name in mixed.measured.losses}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_changes_nothing_or_is_refused(family: str, tmp_path: Path) -> None:
    theirs, model = made(tmp_path, family)
    tokens = tokens_for(VOCABULARY, CONTEXT)
    wanted = expected_logits(theirs, tokens)
    unquantized = {"scheme": "none", "embedding": "none", "compute_precision": "fp32"}
    refused = set()
    for rotate in ("residual", "heads"):
        try:
            found = quantized(model, rotate=rotate, **unquantized)
        except UnsupportedError as error:
            assert str(error).startswith("--rotate") and "leave --rotate out" in str(error)
            refused.add(rotate)
            continue
        error = (rows(found.decoder, tokens) - wanted).abs().max()
        assert error < 1e-3 * wanted.abs().max(), rotate
    assert refused == refusals(model.spec)


@pytest.mark.parametrize("family", EXPORTED)
def test_diff_inspect_and_the_twin(family: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    made(source, family)
    settings = ExportConfig(bits=4, **USUAL)
    first = export(source, output=tmp_path / "first", config=settings, cache=False)
    if family in _TWINS:
        twin = ExportConfig(bits=4, backend="xnnpack", **USUAL)
        other = export(source, output=tmp_path / "twin", config=twin, cache=False)
        tokens = tokens_for(VOCABULARY, 12)
        # Without rounding: random layers of some families magnify that of fp16 beyond any bound.
        # Gains, biases and tables are of fp16 in the program, and of fp32 in its twin: four
        # roundings' worth.
        one, two = load(first.folder, UNROUNDED).logits(tokens), load(other.folder).logits(tokens)
        assert (one - two).abs().max() < 2e-3 * two.abs().max(), "the twin holds the same weights"
    assert diff(first.folder, first.folder, tokens=16).equal
    found = inspect_numerics(first.folder, tokens=16)
    assert found.operations and not found.overflows
