"""The `.pte` files of ExecuTorch's static Llama script, against its own eager model.

Its caches are inputs and outputs, which ExecuTorch's own `StaticAttentionIOManager` keeps. Every
method has three delegates, around and between the transformer's blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import static_llama
from llm_coreml.reference import LoadedMethod, load_method
from shared import Shared
from static_llama import CONTEXT, INPUT, PARAMS

CASES = {
    "single": ["--dtype", "fp32", "--linear_quantize", "b4w"],
    "several": ["--dtype", "fp32", "--linear_quantize", "c4w", "--multifunction"],
    "half": ["--dtype", "fp16", "--linear_quantize", "c4w"],
}
PROMPT, STEPS = 11, 6
# Logits after two layers in fp32, in another order of summing than torch's.
FP32 = 1e-5

Forward = Callable[[torch.Tensor, dict[str, Any]], Any]


@pytest.fixture(scope="module")
def folder(shared: Shared) -> Path:
    def export(path: Path) -> None:
        static_llama.write_checkpoint(path)
        static_llama.export(path, CASES)

    return shared.folder("static-llama", [], export)


@pytest.fixture
def prompt() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(PARAMS["vocab_size"], (1, PROMPT), generator=generator, dtype=torch.int32)


def as_model(method: LoadedMethod) -> Forward:
    """Return the method with the arguments and results of the eager model."""

    def forward(tokens: torch.Tensor, options: dict[str, Any]) -> Any:
        leaves, _ = torch.utils._pytree.tree_flatten((tokens, options))
        logits, *caches = method.run(*leaves)
        keys, values = options["in_cache_state"]
        new_keys = dict(zip(keys, caches[: len(keys)], strict=True))
        new_values = dict(zip(values, caches[len(keys) :], strict=True))
        return logits, {"out_cache_state": (new_keys, new_values)}

    return forward


class Recorder:
    """A model that keeps the logits it gave."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.logits: list[torch.Tensor] = []

    def __call__(self, *arguments: Any) -> Any:
        with torch.inference_mode():
            results = self.model(*arguments)
        self.logits.append(results[0].float())
        return results


def manager(args: Any, length: int, cache: int, dtype: torch.dtype) -> Any:
    from executorch.examples.models.llama.static_attention import StaticAttentionIOManager

    return StaticAttentionIOManager(
        args, input_len=length, cache_lens=cache, dtype=dtype, style="smart_mask"
    )


def generate(model: Forward, state: Any, prompt: torch.Tensor) -> list[int]:
    """Read the prompt, generate, and return what was chosen."""
    first = state.prefill(model, prompt)[0, -1].argmax().item()
    chosen: list[int] = state.decode(model, first, STEPS)
    return chosen


def caches(state: Any) -> list[torch.Tensor]:
    return [*state.k_caches.values(), *state.v_caches.values()]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=FP32 * float(expected.abs().max()))


def compare(ours: Recorder, theirs: Recorder, state: Any, expected: Any) -> None:
    assert len(ours.logits) == len(theirs.logits)
    for actual, wanted in zip(ours.logits, theirs.logits, strict=True):
        close(actual, wanted)
    for actual, wanted in zip(caches(state), caches(expected), strict=True):
        assert bool(wanted.any())
        close(actual, wanted)


def test_single_method(folder: Path, prompt: torch.Tensor) -> None:
    model, args = static_llama.eager(folder, quantize="b4w", dtype=torch.float32, full_logits=True)
    method = load_method(folder / "single.pte")
    assert len(method.programs) == 3
    states = [manager(args, INPUT, CONTEXT - INPUT, torch.float32) for _ in range(2)]
    ours, theirs = Recorder(as_model(method)), Recorder(model)
    assert generate(ours, states[0], prompt) == generate(theirs, states[1], prompt)
    compare(ours, theirs, *states)


def test_several_methods(folder: Path, prompt: torch.Tensor) -> None:
    """Reading and generating are methods that share the weights of one model."""
    model, args = static_llama.eager(folder, quantize="c4w", dtype=torch.float32, full_logits=False)
    path = folder / "several.pte"
    theirs = Recorder(model)
    expected = run_both(theirs, theirs, args, prompt)
    read, write = (Recorder(as_model(load_method(path, name))) for name in ("prefill", "forward"))
    chosen, state = run_both(read, write, args, prompt)
    assert chosen == expected[0]
    read.logits += write.logits
    compare(read, theirs, state, expected[1])


def run_both(read: Forward, write: Forward, args: Any, prompt: torch.Tensor) -> tuple[Any, Any]:
    """Generate with one model for the prompt and one for each token; return tokens and state."""
    reader = manager(args, INPUT, CONTEXT - 1, torch.float32)
    first = reader.prefill(read, prompt)[0, -1].argmax().item()
    writer = manager(args, 1, CONTEXT - 1, torch.float32)
    writer.k_caches, writer.v_caches, writer.pos = reader.k_caches, reader.v_caches, reader.pos
    for mask in writer._masks.values():
        mask.unmask(reader.pos)
    return writer.decode(write, first, STEPS), writer


def test_half_precision(folder: Path, prompt: torch.Tensor) -> None:
    """As near to fp32 as torch's own fp16, which rounds about as often and sums in fp32 too.

    The errors of a thousand logits are compared by their root mean square; each model reads the
    same tokens and its own caches.
    """
    runs = {}
    for name, dtype in (("exact", torch.float32), ("torch", torch.float16)):
        model, args = static_llama.eager(
            folder, quantize="c4w", dtype=torch.float16, full_logits=True
        )
        runs[name] = (Recorder(model.to(dtype)), dtype)
    runs["ours"] = (Recorder(as_model(load_method(folder / "half.pte"))), torch.float16)
    for model, dtype in runs.values():
        manager(args, INPUT, CONTEXT - INPUT, dtype).prefill(model, prompt)
    exact = torch.cat(runs["exact"][0].logits)
    errors = {
        name: float((torch.cat(model.logits) - exact).square().mean().sqrt())
        for name, (model, _) in runs.items()
    }
    assert 0 < errors["ours"] <= 1.5 * errors["torch"]
