"""Attention with a key and value cache in Core ML states, as coremltools converts it.

Weights and inputs are small multiples of a power of two, so that keys and values are exact in fp16
and in fp32: the states must equal torch's buffers bit by bit after every step, in every precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch

import conversion
from llm_coreml.errors import ArtifactError
from llm_coreml.reference import CoreMLProgram

WIDTH, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 16, 4, 2, 8, 16
CACHE = (1, KV_HEADS, CONTEXT, HEAD_DIM)
PRECISIONS = [
    pytest.param(ct.precision.FLOAT32, id="fp32"),
    pytest.param(ct.precision.FLOAT16, id="fp16"),
]


def grid(*shape: int, seed: int) -> torch.Tensor:
    """Return multiples of 1/4 from -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator) / 4


class Attention(torch.nn.Module):
    """Grouped-query attention over a cache; subclasses say how the cache is written."""

    def __init__(self) -> None:
        super().__init__()
        # Core ML's states are fp16; what torch writes there is rounded alike.
        self.register_buffer("keys", torch.zeros(CACHE, dtype=torch.float16))
        self.register_buffer("values", torch.zeros(CACHE, dtype=torch.float16))
        sizes = (HEADS, KV_HEADS, KV_HEADS)
        projections = [torch.nn.Linear(WIDTH, size * HEAD_DIM) for size in sizes]
        self.query, self.key, self.value = projections
        self.out = torch.nn.Linear(HEADS * HEAD_DIM, WIDTH)
        for seed, parameter in enumerate(self.parameters()):
            parameter.requires_grad_(False).copy_(grid(*parameter.shape, seed=seed))

    def heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    def attend(
        self, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        repeats = HEADS // KV_HEADS
        mixed = torch.nn.functional.scaled_dot_product_attention(
            self.heads(self.query(hidden)),
            keys.to(hidden.dtype).repeat_interleave(repeats, 1),
            values.to(hidden.dtype).repeat_interleave(repeats, 1),
            mask,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


class Growing(Attention):
    """Writes behind what is there; the mask's width says where that ends."""

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        end = mask.shape[-1]
        begin = end - hidden.shape[1]
        self.keys[:, :, begin:end] = self.heads(self.key(hidden))
        self.values[:, :, begin:end] = self.heads(self.value(hidden))
        return self.attend(hidden, self.keys[:, :, :end], self.values[:, :, :end], mask)


class Sliding(Attention):
    """Moves the cache up and writes at its end, all at fixed places."""

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for cache, projection in ((self.keys, self.key), (self.values, self.value)):
            cache[:, :, :-2] = cache[:, :, 2:].clone()
            cache[:, :, -2:] = self.heads(projection(hidden))
        return self.attend(hidden, self.keys, self.values, mask)


class Placed(Attention):
    """Writes where a one-hot matrix says, by arithmetic on the whole cache in place."""

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        kept = 1 - places.sum(-1, keepdim=True)
        for cache, projection in ((self.keys, self.key), (self.values, self.value)):
            cache.mul_(kept)
            cache.add_(places @ self.heads(projection(hidden)))
        return self.attend(hidden, self.keys, self.values, mask)


Step = tuple[torch.Tensor, ...]


def causal(count: int, end: int, width: int) -> torch.Tensor:
    """Return the mask [1, 1, count, width] of the last count of end positions."""
    positions = torch.arange(end - count, end)
    return torch.where(torch.arange(width) <= positions[:, None], 0.0, -1e4)[None, None]


def growing_steps(lengths: Sequence[int]) -> list[Step]:
    ends = np.cumsum(lengths).tolist()
    return [
        (grid(1, count, WIDTH, seed=90 + end), causal(count, end, end))
        for count, end in zip(lengths, ends, strict=True)
    ]


def sliding_steps() -> list[Step]:
    """Return steps of two; more of them than the cache holds."""
    steps = []
    for number in range(1, 11):
        seen = min(2 * number, CONTEXT)
        mask = torch.full((1, 1, 2, CONTEXT), -1e4)
        mask[..., CONTEXT - seen :] = causal(2, seen, seen)
        steps.append((grid(1, 2, WIDTH, seed=90 + number), mask))
    return steps


def placed_steps(lengths: Sequence[int]) -> list[Step]:
    steps = []
    for hidden, mask in growing_steps(lengths):
        count, end = mask.shape[-2:]
        places = torch.eye(CONTEXT)[end - count : end].T[None, None]
        steps.append((hidden, causal(count, end, CONTEXT), places))
    return steps


def fixed(*shapes: tuple[int, ...]) -> list[Any]:
    return [
        ct.TensorType(name, shape)
        for name, shape in zip(("hidden", "mask", "places"), shapes, strict=False)
    ]


def ranged() -> list[Any]:
    length = ct.RangeDim(1, 8, default=1)
    width = ct.RangeDim(1, CONTEXT, default=1)
    return fixed((1, length, WIDTH), (1, 1, length, width))


def enumerated() -> list[Any]:
    lengths = (1, 4)

    def shapes(before: tuple[int, ...], after: tuple[int, ...]) -> Any:
        return ct.EnumeratedShapes([(*before, length, *after) for length in lengths])

    return fixed(shapes((1,), (WIDTH,)), shapes((1, 1), (CONTEXT,)), shapes((1, 1, CONTEXT), ()))


def make(module: Attention, steps: list[Step], inputs: list[Any], precision: Any) -> Any:
    states = [
        ct.StateType(ct.TensorType(shape=CACHE, dtype=np.float16), name)
        for name in ("keys", "values")
    ]
    return conversion.convert(
        module,
        steps[0],
        inputs=inputs,
        outputs=[ct.TensorType("result", dtype=np.float32)],
        states=states,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=precision,
    )


def run(program: CoreMLProgram, *step: torch.Tensor) -> torch.Tensor:
    """Take one step; coremltools gives a model of fp16 inputs of fp16."""
    given = dict(zip(("hidden", "mask", "places"), step, strict=False))
    for feature in program.inputs:
        if feature.dtype == "fp16":
            given[feature.name] = given[feature.name].half()
    return program(given)["result"]


def tolerance(module: Attention, expected: torch.Tensor, precision: Any) -> float:
    """Return the largest error of the result, all before the attention being exact."""
    if precision == ct.precision.FLOAT32:
        return 1e-6 * float(expected.abs().max())
    # The attention's result and the projected one are each rounded once.
    mixed = float(module.values.abs().max() * module.out.weight.abs().sum(1).max())
    return 2.0**-11 * (mixed + float(expected.abs().max())) * (1 + 1e-3)


CASES: dict[str, tuple[type[Attention], list[Step], Callable[[], list[Any]]]] = {
    "growing": (Growing, growing_steps((5, 1, 1, 3, 1)), ranged),
    "sliding": (
        Sliding,
        sliding_steps(),
        lambda: fixed((1, 2, WIDTH), (1, 1, 2, CONTEXT)),
    ),
    "placed": (Placed, placed_steps((4, 1, 1, 4, 1)), enumerated),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_decoding(name: str, precision: Any, tmp_path: Path) -> None:
    kind, steps, inputs = CASES[name]
    # Tracing runs the module, and writes its buffers.
    program = conversion.saved(make(kind(), steps, inputs(), precision), tmp_path)
    for _ in range(2):
        module = kind()
        for step in steps:
            expected = module(*step)
            actual = run(program, *step)
            assert torch.equal(program.state("keys"), module.keys.float())
            assert torch.equal(program.state("values"), module.values.float())
            atol = tolerance(module, expected, precision)
            torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
        program.reset()


def test_shapes_beyond_the_declared_are_refused(tmp_path: Path) -> None:
    steps = growing_steps((9,))
    program = conversion.saved(
        make(Growing(), growing_steps((5,)), ranged(), ct.precision.FLOAT32), tmp_path
    )
    with pytest.raises(ArtifactError, match=r"'hidden' has shape \[1, 9, 16\].*1\.\.8"):
        run(program, *steps[0])


def test_exported_program(tmp_path: Path) -> None:
    """The other way into coremltools, which finds the states by itself."""
    steps = sliding_steps()
    model = ct.convert(
        torch.export.export(Sliding().eval(), steps[0]).run_decompositions({}),
        outputs=[ct.TensorType("result", dtype=np.float32)],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    program, module = conversion.saved(model, tmp_path), Sliding()
    for hidden, mask in steps:
        expected = module(hidden, mask)
        actual = run(program, hidden, mask)
        assert torch.equal(program.state("keys"), module.keys.float())
        assert torch.equal(program.state("values"), module.values.float())
        atol = tolerance(module, expected, ct.precision.FLOAT32)
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
