"""A residual stream that fp16 cannot hold is made smaller by a power of two, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from family_table import TABLE, checkpoint
from llm_coreml import export
from llm_coreml.config import ExportConfig
from llm_coreml.decoder import Decoder
from llm_coreml.errors import UnsupportedError
from llm_coreml.model import open_model
from llm_coreml.quantize.fill import fill
from llm_coreml.quantize.residual import needed_shift, shifted
from llm_coreml.runtime.eager import EagerRunner
from tiny import llama, save, tokens_for

SETTINGS = ExportConfig(context=32, seq_lengths=(1, 8), bits=4, group_size=8)


def decoder_of(folder: Path, shift: int) -> Decoder:
    model = open_model(folder)
    weights, spec = shifted(model.weights, model.spec, shift)
    decoder = Decoder(spec, 32)
    fill(decoder, weights, plan=None, storage=None)
    return decoder.eval()


# What enters the first block comes out of a norm without a gain; or the stream itself is normed.
REFUSED = {"nanochat", "openai-gpt"}


def test_a_stream_that_a_norm_makes_is_refused(tmp_path: Path) -> None:
    for family in REFUSED:
        checkpoint(tmp_path, family, next(iter(TABLE[family].cases.values())))
        with pytest.raises(UnsupportedError, match="use --compute-precision fp32"):
            decoder_of(tmp_path, 3)


@pytest.mark.parametrize("family", sorted(TABLE.keys() - REFUSED))
def test_the_logits_of_every_family_stay_bit_by_bit(family: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, family, next(iter(TABLE[family].cases.values())))
    tokens = tokens_for(97, 32)
    plain, small = (decoder_of(tmp_path, shift) for shift in (0, 3))
    hidden, start = plain.spec.hidden_size, torch.tensor([0])
    with torch.no_grad():
        wide = plain.embed(torch.tensor([tokens]))[..., :hidden]
        narrow = small.embed(torch.tensor([tokens]))[..., :hidden]
        assert torch.equal(narrow * 8, wide)
        before = plain.hidden(torch.tensor([tokens]), start)
        after = small.hidden(torch.tensor([tokens]), start)
    assert torch.equal(after * 8, before)
    found = EagerRunner(small, "small").logits(tokens)
    assert torch.equal(found, EagerRunner(plain, "plain").logits(tokens))


def test_as_little_as_is_needed() -> None:
    assert [needed_shift(largest) for largest in (1e4, 32768.0, 32769.0, 2e5)] == [0, 0, 1, 3]
    assert needed_shift(1e9) is None
    assert needed_shift(float("nan")) is None
    assert needed_shift(float("inf")) is None


def too_large(folder: Path) -> tuple[Path, Any]:
    """Write a model whose residual stream is beyond fp16, and whose weights are not."""
    model = llama(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
    return save(model, folder), model


def test_a_stream_beyond_fp16_is_halved_and_told(tmp_path: Path) -> None:
    folder, _ = too_large(tmp_path / "model")
    notes: list[str] = []

    class Notes:
        def stage(self, name: str) -> None: ...
        def advance(self, share: float) -> None: ...
        def note(self, text: str) -> None:
            notes.append(text)

    bundle = export(folder, output=tmp_path / "out", config=SETTINGS, cache=False, progress=Notes())
    rebuild = bundle.manifest.rebuild
    shift = int(rebuild[rebuild.index("--residual-shift") + 1])
    assert shift > 0
    assert any(f"it is halved {shift} times" in note for note in notes)


def test_without_halving_nothing_is_written_and_the_way_out_is_told(tmp_path: Path) -> None:
    folder, _ = too_large(tmp_path / "model")
    config = SETTINGS.under({"residual_shift": 0})
    with pytest.raises(UnsupportedError, match=r"reaches .* with --residual-shift 0.*Give --resid"):
        export(folder, output=tmp_path / "out", config=config, cache=False)
    assert not (tmp_path / "out").exists()


# The largest numbers of published streams, of gemma-3-1b-pt (arXiv 2503.22329) and Qwen3-1.7B
# (arXiv 2605.15572), with the halvings that they need; another text makes more of them, or less.
PUBLISHED = {
    "gemma3_text": ("post_feedforward_layernorm", 95_232.0, range(1, 4)),
    "qwen3": ("mlp.down_proj", 14_208.0, range(1)),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_streams_of_published_size_are_exported(family: str, tmp_path: Path) -> None:
    module, largest, shifts = PUBLISHED[family]
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoint(folder, family, next(iter(TABLE[family].cases.values())))
    tensors = load_file(folder / "model.safetensors")
    written = tensors[f"model.layers.0.{module}.weight"]
    less = 1 if family == "gemma3_text" else 0  # Gemma's gains are 1 + w

    def scale(factor: float) -> float:
        """Scale what the first layer adds, and return the largest number of the stream."""
        written.copy_((written + less) * factor - less)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        tokens, start = torch.tensor([tokens_for(97, 32)]), torch.tensor([0])
        with torch.no_grad():
            return float(decoder_of(folder, 0).hidden(tokens, start).abs().max())

    found = scale(largest / scale(1e4))
    assert found == pytest.approx(largest, rel=0.1)
    bundle = export(folder, output=tmp_path / "out", config=SETTINGS, cache=False)
    words = bundle.manifest.rebuild
    shift = int(words[words.index("--residual-shift") + 1]) if "--residual-shift" in words else 0
    assert shift in shifts
    assert bundle.manifest.verification.passed
