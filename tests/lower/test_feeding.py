"""A program runs as its constant methods say: prompts of every length, to the end of the context.

Held against the eager decoder, by the reference runtime without rounding, and for what stands
around the Core ML program, by ExecuTorch's own runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from artifacts import Artifact, lower, method
from cases import cases
from llm_coreml.config import ExportConfig
from llm_coreml.config.values import DEFAULT_SEQ_LENGTHS
from llm_coreml.errors import ArtifactError
from llm_coreml.lower.padded import Method, OneToken, Padded, padded_length
from llm_coreml.reference import load_method
from llm_coreml.reference.method.kernels import KERNELS
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from stock import StockFeeding
from tiny import llama, mistral, tokens_for

# Only the order of fp32 sums differs.
BOUND = 2e-5
DECODED = 2
FEW = 64  # tokens up to which prompts of all lengths are fed
CASES: dict[str, dict[str, Any]] = {
    "gpu": {"target": "gpu", "seq_lengths": (1, 8)},
    "ane, every row": {"target": "ane", "seq_lengths": (1, 3, 11), "logits": "all"},
    "ane": {"target": "ane", "seq_lengths": (1, 8)},
    "gpu, every row": {"target": "gpu", "seq_lengths": (1, 8), "logits": "all"},
    "one length": {"seq_lengths": (1,)},
    "gpu, windows": {"target": "gpu", "seq_lengths": (1, 4, 11), "context": 96, "window": 14},
    "ane, windows": {
        "target": "ane",
        "seq_lengths": (1, 8),
        "context": 96,
        "window": 3,
        "logits": "all",
    },
    "windows, one length": {"seq_lengths": (1,), "context": 96, "window": 9},
    "the longest is the context": {"seq_lengths": (1, 2, 4, 32)},
    "default lengths": {"seq_lengths": DEFAULT_SEQ_LENGTHS, "context": 1120},
}
FURTHER = tuple(name for name in CASES if name not in ("gpu", "ane, every row"))


def made(name: str, path: Path, **changes: Any) -> Artifact:
    settings = {"context": 32, **CASES[name], **changes}
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 2048,
    }
    window = settings.pop("window", None)
    if window is None:
        return lower(llama(**sizes), ExportConfig(**settings), path)
    kinds = ["sliding_attention", "full_attention"]
    model = mistral(**sizes, sliding_window=window, layer_types=kinds)
    artifact = lower(model, ExportConfig(**settings), path)
    assert {state.ring for state in artifact.decoder.states.values()} == {None, 32}
    return artifact


class Feeding:
    """An artifact fed as its constant methods say, beside the eager decoder that it is from."""

    def __init__(self, artifact: Artifact) -> None:
        self.method = load_method(artifact.path, execution=Execution(mode="fp32"))
        self.context = artifact.shapes.context
        self.tokens = tokens_for(96, self.context)
        self.expected = EagerRunner(artifact.decoder, "eager").logits(self.tokens)

    def prompts(self, *counts: int) -> None:
        """Feed prompts one after the other, a few decoded tokens after each, and compare."""
        self.method.reset()
        runner = StockFeeding(self.method, self.method.constants)
        for count in counts:
            at = runner.position
            self._compare(runner.prefill(self.tokens[at : at + count]), runner.position, counts)
            for token in self.tokens[runner.position :][:DECODED]:
                self._compare(runner.decode(token), runner.position, counts)

    def _compare(self, row: torch.Tensor, position: int, counts: tuple[int, ...]) -> None:
        wanted = self.expected[position - 1]
        error = float((row - wanted).abs().max() / wanted.abs().max())
        assert error < BOUND, f"position {position} of prompts {counts}: {error:.1e}"


def conversations(context: int, lengths: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield prompts of every length up to twice the longest, and of those that end the context.

    Of long ones those beside a length: `test_executorch_pads_as_the_program_needs_it` has each.
    """
    longest = lengths[-1]
    near = {length + more for length in (*lengths, 2 * longest) for more in (-2, -1, 0, 1, 2)}

    def taken(count: int) -> bool:
        return longest <= FEW or count in near or count - longest in near

    for count in filter(taken, range(1, min(2 * longest, context) + 1)):
        yield (count,)
    for count in filter(taken, range(1, min(longest, context - DECODED - 1) + 1)):
        yield (context - count - DECODED, count)
    yield (context,)


@pytest.mark.parametrize("name", cases(CASES, FURTHER))
def test_prompts_of_every_length_run_as_the_constant_methods_say(name: str, tmp_path: Path) -> None:
    feeding = Feeding(made(name, tmp_path / "model.pte"))
    for counts in conversations(feeding.context, CASES[name]["seq_lengths"]):
        feeding.prompts(*counts)


def test_a_position_beyond_the_context_is_refused(tmp_path: Path) -> None:
    """A stock runner asks no one where the context ends once it generates."""
    artifact = made("gpu", tmp_path / "model.pte", scheme="none")
    forward = load_method(artifact.path)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    forward(tokens, torch.tensor([24]))
    for count, start in ((8, 25), (1, 32), (1, -1)):
        with pytest.raises(ArtifactError, match="index_select"):
            forward(tokens[:, :count], torch.tensor([start]))
    with pytest.raises(ArtifactError, match=r"at most \[1, 8\]"):
        forward(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([0]))
    kernels = [step.target for step in method(artifact.path).instructions if step.kind == "kernel"]
    assert set(kernels) < KERNELS
    assert [step.kind for step in method(artifact.path).instructions].count("delegate") == 1


def test_the_padded_length_is_the_next() -> None:
    for lengths in (DEFAULT_SEQ_LENGTHS, (1,), (1, 2, 3, 7, 100), (1, 512)):
        for count in range(1, lengths[-1] + 1):
            assert padded_length(count, lengths) == min(n for n in lengths if n >= count)


class Echo(nn.Module):
    """A program that tells what it is called with: tokens, first and last position."""

    def forward(
        self, tokens: torch.Tensor, start_pos: torch.Tensor, last_pos: torch.Tensor | None
    ) -> torch.Tensor:
        told = [tokens, tokens * 0 + start_pos]
        if last_pos is not None:
            told.append(tokens * 0 + last_pos)
        return torch.stack([part.to(torch.float32) for part in told], dim=-1)


@pytest.mark.parametrize("every_row", [False, True])
def test_executorch_pads_as_the_program_needs_it(every_row: bool, tmp_path: Path) -> None:
    """Its own runtime and kernels, for every number of tokens and the default lengths."""
    around = Padded(Echo(), 1024, DEFAULT_SEQ_LENGTHS, every_row)
    forward = on_executorch(around, DEFAULT_SEQ_LENGTHS[-1], tmp_path / "echo.pte")
    for count in range(1, DEFAULT_SEQ_LENGTHS[-1] + 1):
        tokens = torch.arange(1000, 1000 + count)
        start = (7 * count) % (1025 - count)
        told = forward([tokens[None], torch.tensor([start])])[0]
        padded = count if every_row else min(n for n in DEFAULT_SEQ_LENGTHS if n >= count)
        assert told.shape == (1, padded, 3)
        repeated = [*tokens.tolist(), *[int(tokens[-1])] * (padded - count)]
        assert told[0, :, 0].tolist() == repeated
        assert set(told[0, :, 1].tolist()) == {start}
        assert set(told[0, :, 2].tolist()) == {start + count - 1}
    with pytest.raises(RuntimeError):
        forward([torch.zeros(1, 25, dtype=torch.int64), torch.tensor([1000])])


def test_executorch_passes_one_token(tmp_path: Path) -> None:
    forward = on_executorch(OneToken(Echo(), 64), 1, tmp_path / "echo.pte")
    told = forward([torch.tensor([[70000]]), torch.tensor([63])])[0]
    assert told.tolist() == [[[70000.0, 63.0]]]
    with pytest.raises(RuntimeError):
        forward([torch.tensor([[70000]]), torch.tensor([64])])


def on_executorch(around: Method, longest: int, path: Path) -> Any:
    """Return what runs a method, lowered with no delegate, on ExecuTorch's own runtime."""
    from executorch.exir import EdgeCompileConfig, to_edge
    from executorch.runtime import Runtime, Verification

    from llm_coreml.lower.traced import trace_method

    settings = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    edge = to_edge(trace_method(around, longest), compile_config=settings)
    path.write_bytes(edge.to_executorch().buffer)
    program = Runtime.get().load_program(path, verification=Verification.Minimal)
    return program.load_method("forward").execute


@pytest.mark.exhaustive
def test_the_twin_runs_so_on_executorch(tmp_path: Path) -> None:
    from executorch.runtime import Runtime, Verification

    artifact = made("gpu", tmp_path / "twin.pte", backend="xnnpack", scheme="none")
    tokens = tokens_for(96, 32)
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    program = Runtime.get().load_program(artifact.path, verification=Verification.Minimal)
    names = ("get_max_seq_len", "get_max_context_len", "enable_dynamic_shape", "use_kv_cache")
    constants = {name: program.load_method(name).execute([])[0] for name in names}
    forward = program.load_method("forward")

    def call(tokens: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = forward.execute([tokens, start_pos])[0]
        return logits.clone()

    # What an earlier prompt has left in the cache must not be seen.
    for count in (*range(1, 17), 32):
        runner = StockFeeding(call, constants)
        torch.testing.assert_close(runner.prefill(tokens[:count]), expected[count - 1])
        for token in tokens[count:][:DECODED]:
            torch.testing.assert_close(runner.decode(token), expected[runner.position - 1])
    with pytest.raises(RuntimeError):
        call(torch.zeros(1, 8, dtype=torch.int64), torch.tensor([25]))
