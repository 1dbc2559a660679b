"""Small products beside quantized matrices: `x @ (weight + up @ down).T`, the factors in fp16.

    attach(decoder, {"layers.0.mlp.up_proj": (down, up)})     # an adapter, kept as it is
    attach(decoder, residual_factors(decoder, weights, 8))    # what rounding lost, for training
    factor_bits(decoder)

A product of rank r takes `16 * r * (inputs + outputs)` bits, whatever format the matrix has. The
first factors for training are the best ones of that rank for the matrix itself (Eckart and Young,
1936; for quantized models LQ-LoRA, arXiv:2311.12023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from llm_coreml.checkpoint.weights_view import Weights
from llm_coreml.decoder import Decoder
from llm_coreml.decoder.matrices import Linear
from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.round import dense_rows

# Directions beyond the rank, and turns, of the search for the largest (Halko et al., 0909.4061).
_MORE, _TURNS = 8, 4
Factors = tuple[torch.Tensor, torch.Tensor]


def attach(decoder: Decoder, factors: Mapping[str, Factors]) -> None:
    """Give linear layers what they compute beside their weights.

    Args:
        decoder: With its weights.
        factors: `[rank, inputs]` and `[outputs, rank]` by the layer's name, any float type.

    Raises:
        UnsupportedError: fp16 cannot hold a number.
    """
    for name, (down, up) in factors.items():
        linear = decoder.get_submodule(name)
        assert isinstance(linear, Linear)
        if linear.input_order is not None:
            down = down[:, linear.input_order.to(torch.int64)]
        linear.down, linear.up = (
            nn.Parameter(_halves(name, each), requires_grad=False) for each in (down, up)
        )


def _halves(name: str, values: torch.Tensor) -> torch.Tensor:
    halves = values.detach().to(torch.float16).contiguous()
    if not bool(torch.isfinite(halves).all()):
        raise UnsupportedError(
            f"{name}: a number beside the weight is {float(values.abs().max()):g}, and fp16 ends "
            "at 65504; give --adapters merged, or leave --recover out."
        )
    return halves


def factors_of(decoder: Decoder) -> Iterator[tuple[str, Factors]]:
    """Yield the layers that compute something beside their weights."""
    for name, module in decoder.named_modules():
        if isinstance(module, Linear) and module.down is not None and module.up is not None:
            yield name, (module.down, module.up)


def factor_bits(decoder: Decoder) -> int:
    """Return what all of them take."""
    return 16 * sum(down.numel() + up.numel() for _, (down, up) in factors_of(decoder))


def largest_rank(decoder: Decoder) -> int:
    """Return the rank of the largest, 0 where there are none."""
    return max((len(down) for _, (down, _) in factors_of(decoder)), default=0)


def residual_factors(decoder: Decoder, weights: Weights, rank: int) -> dict[str, Factors]:
    """Return the products of a rank that make up best for what rounding took from the matrices.

    Args:
        decoder: Quantized.
        weights: What it was quantized from.
        rank: Of each product, or as much as the matrix has.
    """
    found = {}
    for name, module in decoder.layers.named_modules(prefix="layers"):
        if not isinstance(module, Linear):
            continue
        lost = weights.tensor(f"{name}.weight", torch.float32)
        if module.input_order is not None:
            lost = lost[:, module.input_order.to(torch.int64)]
        lost -= torch.cat(list(dense_rows(module.weight)))
        left, sizes, right = _largest(lost, min(rank, *lost.shape))
        roots = sizes.sqrt()
        found[name] = (roots.unsqueeze(1) * right.T, left * roots)
    return found


def _largest(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the parts of a singular value decomposition with the largest values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = min(rank + _MORE, *matrix.shape)
        left, sizes, right = torch.svd_lowrank(matrix, q=width, niter=_TURNS)
    return left[:, :rank], sizes[:rank], right[:, :rank]
