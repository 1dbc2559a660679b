"""Programs of several methods, which hand a cache to each other, fed by the runner in C++."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

from cpp_runner import call, made
from exported import manifest_of
from shared import Shared

VOCABULARY, CONTEXT, LENGTHS = 11, 40, {"prefill": 4, "decode": 1}


class Counting(torch.nn.Module):
    """Its logits are a hash of how often each token was read, and of the position."""

    def forward(
        self, tokens: torch.Tensor, start_pos: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(VOCABULARY)
        counts = past + (tokens[0, :, None] == ids).to(torch.float32).sum(0)
        mixed = torch.remainder(7 * counts + 3 * ids + start_pos, VOCABULARY)
        return (mixed + 0.01 * ids)[None, None], counts


def generated(prompt: list[int], count: int) -> list[int]:
    """Return what a greedy runner makes of a prompt, in chunks of 4 and 1."""
    model, past, position = Counting(), torch.zeros(VOCABULARY), 0
    ids: list[int] = []
    tokens = list(prompt)
    while len(ids) < count:
        while tokens:
            size = 4 if len(tokens) >= 4 else 1
            chunk = torch.tensor([tokens[:size]])
            logits, past = model(chunk, torch.tensor([position]), past)
            tokens, position = tokens[size:], position + size
        ids.append(int(logits[0, -1].argmax()))
        tokens = ids[-1:]
    return ids


@pytest.fixture(scope="session")
def counting(shared: Shared, twin: Path) -> Path:
    """A bundle of two methods without states."""

    def make(folder: Path) -> None:
        own = Path(shutil.copytree(twin, folder / "counting"))
        exported = {
            name: torch.export.export(
                Counting(),
                (torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, dtype=torch.int64),
                 torch.zeros(VOCABULARY)),
            )
            for name, length in LENGTHS.items()
        }  # fmt: skip
        constants = {"get_vocab_size": VOCABULARY, "get_max_context_len": CONTEXT}
        edge = to_edge_transform_and_lower(
            exported,
            constant_methods=constants,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        data = bytes(edge.to_executorch().buffer)
        (own / "model.pte").write_bytes(data)
        manifest = manifest_of(own)
        manifest["program"] |= {
            "bytes": len(data),
            "constant_methods": constants,
            "methods": {name: {"seq_lengths": [length]} for name, length in LENGTHS.items()},
        }
        (own / "manifest.json").write_text(json.dumps(manifest))

    return shared.folder("counting", [twin], make) / "counting"


@pytest.mark.parametrize("prompt", [[3], [5, 5, 7, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]], ids=len)
def test_a_cache_goes_from_method_to_method(
    cpp_runner: Path, counting: Path, prompt: list[int]
) -> None:
    found = made(cpp_runner, counting, prompt, "--max-new-tokens", 12, "--runs", 2)
    assert found["ids"] == generated(prompt, 12)
    assert found["runs_agree"] is True, "a reset leaves no cache behind"


def test_lengths_of_a_range_are_fed_at_once(cpp_runner: Path, twin: Path, tmp_path: Path) -> None:
    """The twin takes every length, as a range does; the manifest says how it is fed."""
    own = Path(shutil.copytree(twin, tmp_path / "own"))
    manifest = manifest_of(own)
    prompt = list(range(2, 23))  # 8 + 8 + 5, and without the range 8 + 8 + 5 x 1
    expected = made(cpp_runner, twin, prompt, "--max-new-tokens", 8)["ids"]
    manifest["program"]["form"] = "range"
    (own / "manifest.json").write_text(json.dumps(manifest))
    assert made(cpp_runner, own, prompt, "--max-new-tokens", 8)["ids"] == expected
    # Without single tokens among the lengths, a method pads.
    manifest["program"] |= {"form": "static"}
    manifest["program"]["methods"]["forward"]["seq_lengths"] = [8]
    (own / "manifest.json").write_text(json.dumps(manifest))
    assert made(cpp_runner, own, prompt, "--max-new-tokens", 8)["ids"] == expected


def test_methods_that_take_different_caches(
    cpp_runner: Path, counting: Path, twin: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(counting, tmp_path / "own"))
    manifest = manifest_of(own)
    # A constant method takes no cache at all, nor tokens.
    manifest["program"]["methods"]["get_vocab_size"] = {"seq_lengths": [2]}
    (own / "manifest.json").write_text(json.dumps(manifest))
    done = call(cpp_runner, own, [1])
    assert done.code == 7 and "take different caches; export it again" in done.err
