"""What the artifact holds is what the eager decoder computes with, and takes the bytes foretold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from artifacts import Artifact, matrices, weight_bytes

# weight.bin pads each blob to 64 bytes and puts 64 bytes of metadata before it.
PER_BLOB = 128


def eager_matrices(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Return every matrix of the eager decoder, dequantized, in fp32."""
    found = {}
    for name, module in artifact.decoder.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight
            dequantize = getattr(weight, "dequantize", None)
            quantized = type(weight) not in (nn.Parameter, torch.Tensor)
            dense = dequantize() if quantized and dequantize else weight
            found[name] = dense.detach().to(torch.float32)
    return found


def test_weights_are_the_eager_ones_bit_by_bit(
    quantized: Callable[[str], Artifact], scheme_label: str
) -> None:
    artifact = quantized(scheme_label)
    stored = matrices(artifact.path, artifact.decoder.spec)
    eager = eager_matrices(artifact)
    assert set(stored) == set(eager)
    for name, matrix in stored.items():
        assert matrix.declared == "fp16"
        assert torch.equal(matrix.dense, eager[name]), name


def test_matrices_take_the_bytes_that_the_scheme_foretells(
    quantized: Callable[[str], Artifact], scheme_label: str
) -> None:
    artifact = quantized(scheme_label)
    stored = matrices(artifact.path, artifact.decoder.spec)
    total = 0.0
    for name, matrix in stored.items():
        rows, columns = matrix.dense.shape
        scheme = artifact.plan.scheme_of(name)
        foretold = scheme.bits_per_weight((rows, columns)) * rows * columns / 8
        assert matrix.bytes == foretold, name
        total += 0 if artifact.plan.tied and name == "lm_head" else foretold
    decoder = artifact.decoder
    fp16 = [decoder.cos, decoder.sin, *(p for n, p in decoder.named_parameters() if "norm" in n)]
    small = sum(2 * tensor.numel() for tensor in fp16) + 4 * decoder.context
    # coremltools gives each linear layer without a bias a bias of zeros.
    biases = sum(2 * m.out_features for m in decoder.modules() if isinstance(m, nn.Linear))
    # Codes, scales and zero points or a table.
    blobs = 4 * len(stored) + len(fp16) + 1 + len(stored)
    size = weight_bytes(artifact.path)
    assert total + small <= size <= total + small + biases + (blobs + 1) * PER_BLOB


def test_scales_and_tables_are_fp16_numbers(
    quantized: Callable[[str], Artifact], scheme_label: str
) -> None:
    checked = 0
    for name, module in quantized(scheme_label).decoder.named_modules():
        weight = getattr(module, "weight", None)
        for attribute in ("scale", "codebook", "tables", "zero_point"):
            values = getattr(weight, attribute, None)
            if values is not None:
                assert torch.equal(values, values.half().to(values.dtype)), f"{name} {attribute}"
                checked += 1
    assert checked >= 7
