"""A model with massive activations: its export passes and says so, a wrong program of it does not.

Real ones hold some 18,000 in one channel of the residual stream, where fp16 steps by 16, and take
it out again later.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from artifacts import UNQUANTIZED
from cases import cases
from llm_coreml import pipeline
from llm_coreml.bundle.failed import FIGURES
from llm_coreml.config import ExportConfig
from llm_coreml.decoder import Decoder
from llm_coreml.errors import VerificationError
from llm_coreml.lower.forms import Enumerated, OnProgress
from llm_coreml.progress import Silent
from llm_coreml.targets import NormForm
from llm_coreml.verify.verification import MAX_RELATIVE_ERROR, Conversion
from tiny import llama, tokens_for

WRITES, TAKES, CHANNEL = 1, 2, 7
CONFIG = ExportConfig(context=64, seq_lengths=(1, 8), **UNQUANTIZED)
WRONG = {"without rounding": "run without rounding", "as declared": "Plain fp16 makes"}


def massive() -> Any:
    """One layer writes the number wherever channel 0 is large, which is everywhere."""
    model = llama(num_hidden_layers=4)
    layers = model.model.layers
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 60
        model.model.norm.weight[0] = 0
        for layer in layers:
            layer.mlp.down_proj.weight[0] = layer.self_attn.o_proj.weight[0] = 0
        for index, seen, factor in ((WRITES, 0, 420.0), (TAKES, CHANNEL, -420.0)):
            mlp = layers[index].mlp
            mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = mlp.down_proj.weight[:, 0] = 0
            mlp.gate_proj.weight[0, seen] = mlp.up_proj.weight[0, seen] = 1
            mlp.down_proj.weight[CHANNEL, 0] = factor
    return model


class Notes(Silent):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told = ""

    def note(self, text: str) -> None:
        """Keep it."""
        self.told += f"{text}\n"


@pytest.mark.parametrize("norm", cases(get_args(NormForm), ("layer",)))
def test_it_passes_and_the_noise_is_told_with_its_layer(tmp_path: Path, norm: NormForm) -> None:
    model, notes = massive(), Notes()
    with torch.no_grad():
        tokens = torch.tensor([tokens_for(97, 64)])
        states = model(tokens, output_hidden_states=True).hidden_states
    assert 17_000 < states[WRITES + 1][..., CHANNEL].min() < 20_000
    assert states[TAKES + 1].abs().max() < 200
    config = replace(CONFIG, norm=norm)
    bundle = pipeline.export(
        model, output=tmp_path / "out", config=config, cache=False, progress=notes
    )
    found = bundle.manifest.verification
    assert found.plain_fp16 is not None and found.plain_fp16.layer == TAKES
    assert MAX_RELATIVE_ERROR < found.max_relative_error <= found.max_relative_error_bound
    assert f"fp16 is noisy in this model, most of all in layer {TAKES}: " in notes.told
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("check", cases(WRONG, ("without rounding",)))
def test_a_wrong_program_of_it_fails_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    write: Callable[..., None] = Enumerated.write

    def wrong(
        self: Enumerated, decoder: Decoder, path: Path, on_progress: OnProgress = lambda _: None
    ) -> None:
        """Two layers in each other's place: all weights are the model's."""
        layers = decoder.layers
        layers[0], layers[3] = layers[3], layers[0]
        write(self, decoder, path, on_progress)
        layers[0], layers[3] = layers[3], layers[0]

    monkeypatch.setattr(Enumerated, "write", wrong)
    if check == "as declared":
        passed = Conversion(1, 1, 0.0, 1e-5)
        monkeypatch.setattr(pipeline, "verify_conversion", lambda *_: passed)
    with pytest.raises(VerificationError, match=WRONG[check]):
        pipeline.export(massive(), output=tmp_path / "out", config=CONFIG, cache=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    told = json.loads((tmp_path / "out.failed" / FIGURES).read_text())
    assert told["found"]["max_relative_error"] > told["found"]["max_relative_error_bound"]
