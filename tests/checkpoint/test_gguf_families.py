"""GGUF files of every architecture that is read, as llama.cpp's converter writes them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from family_table import their_model, write_config
from gguf_converter import convert
from llm_coreml.checkpoint.gguf_architectures import ARCHITECTURES
from llm_coreml.families import find_family, known_model_types
from llm_coreml.model import open_model

# What beside the sizes of the table shows that a number is read; families as they are built.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 24}),
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


def rounded(spec: Any) -> Any:
    """Return a spec as plain data, its numbers as fp32, which is what a file holds."""
    if is_dataclass(spec):
        return {field.name: rounded(getattr(spec, field.name)) for field in fields(spec)}
    if isinstance(spec, tuple):
        return [rounded(each) for each in spec]
    return float(f"{np.float32(spec):.6g}") if isinstance(spec, float) else spec


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
