"""Weights that coremltools compressed, against the PyTorch module holding what they stand for.

coremltools' own `decompress_weights` says what a compressed weight means. Two calls compare with
it: unit vectors, whose results are the weights themselves and must be equal bit by bit, and random
inputs, whose results must be those of the torch module with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch

import conversion
from llm_coreml.reference import CoreMLProgram

ROWS, COLUMNS, FILTERS, CHANNELS, KERNEL, VOCABULARY = 32, 24, 16, 8, 2, 48
# Sums of at most 32 products in fp32, in another order than torch's; and one rounding to fp16.
FP32, FP16 = 1e-6, 2.0**-11

Model = Any
Compress = Callable[[Model], Model]


class Weights(torch.nn.Module):
    """One weight each of linear, conv, embedding and matmul, with no bias to hide behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        self.conv = torch.nn.Conv2d(CHANNELS, FILTERS, KERNEL, bias=False)
        self.table = torch.nn.Embedding(VOCABULARY, COLUMNS)
        self.right = torch.nn.Parameter(torch.randn(2, COLUMNS, ROWS))

    def forward(
        self, rows: torch.Tensor, images: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return self.linear(rows), self.conv(images), self.table(tokens), rows[None] @ self.right


def unit_inputs() -> tuple[torch.Tensor, ...]:
    """Return the inputs for which the module returns its weights."""
    count = CHANNELS * KERNEL**2
    images = torch.eye(count).reshape(count, CHANNELS, KERNEL, KERNEL)
    return torch.eye(COLUMNS), images, torch.arange(VOCABULARY, dtype=torch.int32)


def random_inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randn(item.shape, generator=generator).half().float() for item in unit_inputs()[:2]
    ]
    return *drawn, torch.randint(VOCABULARY, (VOCABULARY,), generator=generator, dtype=torch.int32)


NAMES = ("rows", "images", "tokens")
OUTPUTS = ("linear", "conv", "table", "right")


def config(kind: Any, **settings: Any) -> cto.OptimizationConfig:
    return cto.OptimizationConfig(global_config=kind(weight_threshold=0, **settings))


def palettized(joint: bool = False, **settings: Any) -> Compress:
    return partial(
        cto.palettize_weights,
        config=config(cto.OpPalettizerConfig, **settings),
        joint_compression=joint,
    )


def quantized(joint: bool = False, **settings: Any) -> Compress:
    return partial(
        cto.linear_quantize_weights,
        config=config(cto.OpLinearQuantizerConfig, **settings),
        joint_compression=joint,
    )


def pruned(
    joint: bool = False, kind: Any = cto.OpMagnitudePrunerConfig, **settings: Any
) -> Compress:
    return partial(cto.prune_weights, config=config(kind, **settings), joint_compression=joint)


def chain(*steps: Compress) -> Compress:
    def compress(model: Model) -> Model:
        for step in steps:
            model = step(model)
        return model

    return compress


GROUPED = {"granularity": "per_grouped_channel"}
HALF = pruned(target_sparsity=0.5)
PALETTE = palettized(nbits=4)
LUT = "constexpr_lut_to_dense"
SCALE = "constexpr_blockwise_shift_scale"
SPARSE = "constexpr_sparse_to_dense"
LUT_SPARSE = "constexpr_lut_to_sparse"
SCALE_SPARSE = "constexpr_sparse_blockwise_shift_scale"

# Name to: how to compress, the operations that must then be in the file.
IOS18: dict[str, tuple[Compress, set[str]]] = {
    **{
        f"palette of {bits} bits": (palettized(nbits=bits), {LUT}) for bits in (1, 2, 3, 4, 6, 8)
    },
    "uniform palette": (palettized(nbits=4, mode="uniform"), {LUT}),
    "groups of rows": (palettized(nbits=3, group_size=8, **GROUPED), {LUT}),
    "groups of columns": (palettized(nbits=4, group_size=4, channel_axis=1, **GROUPED), {LUT}),
    "scaled rows": (
        palettized(nbits=4, group_size=8, enable_per_channel_scale=True, **GROUPED),
        {LUT, SCALE},
    ),
    "pairs": (palettized(nbits=4, cluster_dim=2), {LUT}),
    "fours in groups": (palettized(nbits=2, cluster_dim=4, group_size=8, **GROUPED), {LUT}),
    **{
        f"{dtype} {mode} {granularity}": (
            quantized(dtype=dtype, mode=mode, granularity=granularity, block_size=4),
            {SCALE},
        )
        for dtype in ("int8", "uint8", "int4", "uint4")
        for mode in ("linear_symmetric", "linear")
        for granularity in ("per_tensor", "per_channel", "per_block")
    },
    "half sparse": (HALF, {SPARSE}),
    "sparse blocks": (pruned(target_sparsity=0.5, block_size=2, dim=0), {SPARSE}),
    "three of four": (pruned(n_m_ratio=(3, 4), dim=1), {SPARSE}),
    "threshold": (
        pruned(kind=cto.OpThresholdPrunerConfig, threshold=0.08, minimum_sparsity_percentile=0.1),
        {SPARSE},
    ),
    "sparse palette": (chain(HALF, palettized(True, nbits=4)), {LUT_SPARSE, SPARSE}),
    "sparse groups": (
        chain(HALF, palettized(True, nbits=2, group_size=8, **GROUPED)),
        {LUT_SPARSE, SPARSE},
    ),
    "palette, then sparse": (
        chain(PALETTE, pruned(True, target_sparsity=0.5)),
        {LUT_SPARSE, SPARSE},
    ),
    "sparse int8": (chain(HALF, quantized(True, dtype="int8")), {SCALE_SPARSE, SPARSE}),
    "sparse int8 linear": (
        chain(HALF, quantized(True, dtype="int8", mode="linear")),
        {SCALE_SPARSE, SPARSE},
    ),
    "sparse int4 blocks": (
        # Two of four in every block: coremltools divides by its scale, which must not be zero.
        chain(
            pruned(n_m_ratio=(2, 4), dim=1),
            quantized(True, dtype="int4", granularity="per_block", block_size=4),
        ),
        {SCALE_SPARSE, SPARSE, SCALE},
    ),
    "int8, then sparse": (
        chain(quantized(dtype="int8"), pruned(True, target_sparsity=0.5)),
        {SCALE_SPARSE, SPARSE},
    ),
    "int8 table": (
        chain(PALETTE, quantized(True, dtype="int8", granularity="per_tensor")),
        {SCALE, LUT},
    ),
    "uint8 table": (
        chain(PALETTE, quantized(True, dtype="uint8", mode="linear", granularity="per_tensor")),
        {SCALE, LUT},
    ),
    "sparse int8 table": (
        chain(HALF, palettized(True, nbits=4), quantized(True, granularity="per_tensor")),
        {SCALE, LUT_SPARSE, SPARSE},
    ),
}  # fmt: skip
IOS16: dict[str, tuple[Compress, set[str]]] = {
    "palette of 1 bit": (palettized(nbits=1), {LUT}),
    "palette of 6 bits": (palettized(nbits=6), {LUT}),
    "int8": (quantized(dtype="int8"), {"constexpr_affine_dequantize"}),
    "uint8 linear": (quantized(dtype="uint8", mode="linear"), {"constexpr_affine_dequantize"}),
    "half sparse": (HALF, {SPARSE}),
}
# One of each kind again in fp16, whose scales and tables are fp16.
IN_HALF = (
    "palette of 6 bits",
    "scaled rows",
    "fours in groups",
    "int8 linear per_channel",
    "uint4 linear per_block",
    "half sparse",
    "sparse groups",
    "sparse int8 linear",
    "uint8 table",
    "sparse int8 table",
)


def convert(target: Any, precision: Any) -> Model:
    inputs = unit_inputs()
    return conversion.convert(
        Weights(),
        inputs,
        inputs=[
            ct.TensorType(name, item.shape, np.int32 if name == "tokens" else np.float32)
            for name, item in zip(NAMES, inputs, strict=True)
        ],
        outputs=[ct.TensorType(name, dtype=np.float32) for name in OUTPUTS],
        minimum_deployment_target=target,
        compute_precision=precision,
    )


@pytest.fixture(scope="module")
def dense() -> Iterator[Callable[[Any, Any], Model]]:
    """The uncompressed model, converted once per target and precision."""
    made: dict[Any, Model] = {}

    def get(target: Any, precision: Any) -> Model:
        if (target, precision) not in made:
            made[target, precision] = convert(target, precision)
        return made[target, precision]

    yield get


def operations(model: Model) -> set[str]:
    found = {operation.op_type for operation in model._mil_program.functions["main"].operations}
    return {name for name in found if name.startswith("constexpr_")}


def meaning(model: Model) -> Weights:
    """Return the torch module with the weights as coremltools decompresses them."""
    metadata = cto.get_weights_metadata(cto.decompress_weights(model), weight_threshold=0)
    module = Weights().eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        flat = name.replace(".", "_")
        (value,) = [item.val for key, item in metadata.items() if key.startswith(flat)]
        parameter.copy_(torch.from_numpy(value))
    return module


def run(program: CoreMLProgram, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return program(dict(zip(NAMES, inputs, strict=True)))


def cases() -> list[Any]:
    """Return every case in fp32; in fp16, one per kind of compression."""
    single, half = ct.precision.FLOAT32, ct.precision.FLOAT16
    listed = [(ct.target.iOS18, single, name, case) for name, case in IOS18.items()]
    listed += [(ct.target.iOS16, single, name, case) for name, case in IOS16.items()]
    listed += [(ct.target.iOS18, half, name, IOS18[name]) for name in IN_HALF]
    return [
        pytest.param(target, precision, *case, id=f"{target.name} {precision.value} {name}")
        for target, precision, name, case in listed
    ]


@pytest.mark.parametrize(("target", "precision", "compress", "expected"), cases())
def test_compressed_weights(
    target: Any, precision: Any, compress: Compress, expected: set[str], dense: Any, tmp_path: Path
) -> None:
    model = compress(dense(target, precision))
    assert operations(model) == expected
    program = conversion.saved(model, tmp_path)
    module = meaning(model)
    original = dict(Weights().named_parameters())
    for name, parameter in module.named_parameters():
        likeness = torch.cosine_similarity(parameter.flatten(), original[name].flatten(), dim=0)
        assert likeness > 0.6, f"{name} is not what was compressed"
    weights = run(program, unit_inputs())
    for name, value in zip(OUTPUTS, module(*unit_inputs()), strict=True):
        assert torch.equal(weights[name], value), name
    rounding = FP16 if precision == ct.precision.FLOAT16 else 0.0
    results = run(program, random_inputs())
    for name, value in zip(OUTPUTS, module(*random_inputs()), strict=True):
        atol = FP32 * float(value.abs().max())
        torch.testing.assert_close(results[name], value, rtol=rounding, atol=atol)
