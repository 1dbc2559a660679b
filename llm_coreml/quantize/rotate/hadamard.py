"""Orthogonal matrices of any order that spread a single number evenly over all.

    rotation = Rotation(3072)            # signs, then Sylvester 256 x Paley 12
    rotation.apply(x)                    # x @ R for x [..., 3072], in fp64

A Hadamard matrix has entries of one size. The Kronecker product of two is another, so that of order
`2^k m` is made of Sylvester's and one of Paley's (J. Math. Phys. 12, 1933), and applied factor by
factor. Orders that have none take the Hartley matrix of their odd part, cos + sin of the angles of
the discrete Fourier transform: its entries are at most sqrt(2) times as large.
"""

from __future__ import annotations

import hashlib
import math

import torch

SEED = 0
# Larger factors of powers of two cost more products, smaller ones more passes.
_LARGEST = 64


class Rotation:
    """`R = diag(signs) (... x F2 x F1)`, orthogonal, with signs drawn from a seed.

    Attributes:
        size: Order of R.
        label: Its factors, `Sylvester 64 x Paley 12`.

    Args:
        size: Order of R, at least 1.
        seed: Of the signs, which are the same on every machine.
    """

    def __init__(self, size: int, seed: int = SEED) -> None:
        self.size = size
        core, name = _core(size)
        power = size // len(core)
        names = [f"Sylvester {power}"] if power > 1 or not name else []
        self.label = " x ".join(names + [name] * bool(name))
        factors = [*_sylvester_factors(power), core]
        self._factors = [factor for factor in factors if len(factor) > 1]
        bits = hashlib.shake_256(f"{seed} {size}".encode()).digest(size)
        signs = [1 - 2 * (bit & 1) for bit in bits]
        self._signs = torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x @ R` for each block of `size` values of the last axis, fp64 -> fp64."""
        blocks = x.reshape(-1, self.size) * self._signs
        # Each product mixes the last axis of the index and brings it to the front.
        for factor in self._factors:
            order = len(factor)
            mixed = blocks.reshape(-1, self.size // order, order) @ factor
            blocks = mixed.transpose(1, 2)
        return blocks.reshape(x.shape)


def paley(order: int) -> torch.Tensor | None:
    """Return a Hadamard matrix of Paley's, fp64 `[order, order]` of ones and minus ones, if any."""
    first, second = order - 1, order // 2 - 1
    eye = torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and first % 4 == 3 and _is_prime(first):
        return eye + _bordered(first, -1.0)
    if order % 4 == 0 and second % 4 == 1 and _is_prime(second):
        symmetric = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
        return torch.kron(_bordered(second, 1.0), symmetric) + torch.kron(
            eye[: second + 1, : second + 1], diagonal
        )
    return None


def hartley(order: int) -> torch.Tensor:
    """Return `cos + sin` of `2 pi i j / order`, fp64, `sqrt(order)` times an orthogonal matrix."""
    index = torch.arange(order)
    angle = (index.outer(index) % order).to(torch.float64) * (2 * math.pi / order)
    return torch.cos(angle) + torch.sin(angle)


def _core(size: int) -> tuple[torch.Tensor, str]:
    """Return the factor that `size` has beside a power of two, and its name, empty for none."""
    power = size & -size
    odd = size // power
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64), ""
    for exponent in range(2, power.bit_length()):
        order = odd << exponent
        if (found := paley(order)) is not None:
            return found, f"Paley {order}"
    return hartley(odd), f"Hartley {odd}"


def _sylvester_factors(power: int) -> list[torch.Tensor]:
    """Return matrices of at most `_LARGEST` rows whose product is Sylvester's of that order."""
    if power <= _LARGEST:
        return [_sylvester(power)]
    return [_sylvester(_LARGEST), *_sylvester_factors(power // _LARGEST)]


def _sylvester(order: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix


def _bordered(prime: int, below: float) -> torch.Tensor:
    """Return the Jacobsthal matrix of a prime with a row of ones above it, `below` at its left."""
    squares = {i * i % prime for i in range(1, prime)}
    character = [0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)]
    index = torch.arange(prime)
    result = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    result[0, 1:], result[1:, 0] = 1.0, below
    values = torch.tensor(character, dtype=torch.float64)
    result[1:, 1:] = values[(index[:, None] - index) % prime]
    return result


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1))
