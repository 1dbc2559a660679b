"""The residual stream, smaller by a power of two, so that fp16 holds it.

    weights, spec = shifted(weights, spec, 3)       # an eighth of it; the logits stay as they are

Published Gemma 3 models reach streams beyond the 65504 of fp16 (vllm-project/vllm pull request
17364, huggingface/transformers issue 36822). All that reads the stream reads it behind a norm,
which divides by its size, or by a matrix that can be that much larger. So whatever writes to it is
made smaller: the factor of the token table, and the gains of norms of what layers add, or else the
matrices. A power of two changes no digit of any number; eps shrinks by its square.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import final

import torch

from llm_coreml.checkpoint.checkpoint import cast_checked
from llm_coreml.checkpoint.matrix import Packed, PackedForm
from llm_coreml.checkpoint.weights_view import Weights
from llm_coreml.decoder import DecoderSpec, skeleton
from llm_coreml.decoder.spec import LayerSpec, NormSpec
from llm_coreml.errors import UnsupportedError

# The stream may be twice what one text makes of it, and sums are rounded upwards on the way.
_ROOM = 2.0**15
LARGEST_SHIFT = 8


def needed_shift(largest: float) -> int | None:
    """Return how often a stream is to be halved, whose largest number is `largest`.

    Returns:
        0 if fp16 holds it as it is; None if that many halvings are too many.
    """
    for shift in range(LARGEST_SHIFT + 1):
        if largest * 2.0**-shift <= _ROOM:
            return shift
    return None


def shifted(weights: Weights, spec: DecoderSpec, shift: int) -> tuple[Weights, DecoderSpec]:
    """Return weights and sizes of a decoder of the same function, its stream `2**-shift` as large.

    Raises:
        UnsupportedError: what enters the first block comes out of a norm without a gain, or norms
            are taken of the stream itself.
    """
    if not shift:
        return weights, spec
    if any(layer.sums_normed for layer in spec.layers):
        raise UnsupportedError(
            "--residual-shift makes a residual stream smaller, and that of this model is normed "
            "behind every part; use --compute-precision fp32."
        )
    normed = spec.embedding_norm is not None
    if spec.embedding_norm is not None and not spec.embedding_norm.gain:
        raise UnsupportedError(
            "--residual-shift makes gains smaller, and the norm of this model's token table has "
            "none; use --compute-precision fp32."
        )
    factors = _factors(spec, weights.names(), 2.0**-shift)
    small = 4.0**-shift

    def behind(norm: NormSpec | None) -> NormSpec | None:
        return None if norm is None else replace(norm, eps=norm.eps * small)

    def layer(each: LayerSpec) -> LayerSpec:
        mixer = replace(each.mixer, norm=behind(each.mixer.norm))
        return replace(
            each,
            mixer=mixer,
            feed_forward=replace(each.feed_forward, norm=behind(each.feed_forward.norm)),
        )

    return ShiftedWeights(weights, factors), replace(
        spec,
        layers=tuple(map(layer, spec.layers)),
        norm=replace(spec.norm, eps=spec.norm.eps * small),
        embedding_multiplier=spec.embedding_multiplier * (1.0 if normed else 2.0**-shift),
    )


def _factors(spec: DecoderSpec, names: Collection[str], less: float) -> dict[str, float]:
    """Return what parameters are multiplied by, by name."""
    decoder = skeleton(spec)
    wiring, modules = decoder.wiring, dict(decoder.named_modules())
    # A norm of the rows takes any size of them and of what is added.
    entering = "embed_positions" if spec.embedding_norm is None else "embed_norm"
    found: dict[str, float] = {}
    for name in names:
        owner, _, kind = name.rpartition(".")
        matrix = wiring.matrices.get(owner)
        if matrix is not None and owner != "embed_tokens":
            if matrix.writes == "residual" and _out_norm(owner) not in modules:
                found[name] = less
            elif matrix.reads == "residual" and matrix.norm is None and kind == "weight":
                found[name] = 1 / less
        elif owner.endswith("_out_norm") or owner == entering:
            found[name] = less
    return found


def _out_norm(owner: str) -> str:
    """Return the norm of what a matrix writes, where there is one."""
    block, part = owner.rsplit(".", 2)[:2]
    kinds = {"self_attn": "attention_out_norm", "mlp": "mlp_out_norm"}
    return f"{block}.{kinds.get(part, f'{part}_out_norm')}"


@final
class ShiftedWeights(Weights):
    """Weights of which some are multiplied by powers of two when they are read.

    Args:
        weights: As they were.
        factors: Of parameters, by name.
    """

    def __init__(self, weights: Weights, factors: Mapping[str, float]) -> None:
        self._weights = weights
        self._factors = factors

    def names(self) -> frozenset[str]:
        """Return the names of all parameters."""
        return self._weights.names()

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of `name`; what is multiplied is computed in fp32."""
        return torch.float32 if name in self._factors else self._weights.dtype(name)

    def described(self, name: str) -> str:
        """Return what a message calls `name`."""
        return self._weights.described(name)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read one parameter and multiply it."""
        if name not in self._factors:
            return self._weights.tensor(name, dtype)
        values = self._weights.tensor(name, torch.float32) * self._factors[name]
        return cast_checked(values, dtype, self.described(name))

    def sha256(self, names: Collection[str]) -> str:
        """Return a hash of parameters and of what they are multiplied by."""
        factors = sorted((name, self._factors[name]) for name in names if name in self._factors)
        found = self._weights.sha256(names)
        return hashlib.sha256(repr((found, factors)).encode()).hexdigest() if factors else found

    def forms(self) -> Mapping[str, PackedForm]:
        """Return the forms of parameters that are quantized already."""
        return MappingProxyType(dict(self._weights.forms()))

    def packed(self, name: str) -> Packed | None:
        """Return a matrix that is quantized already, its scales multiplied.

        Raises:
            UnsupportedError: fp16 cannot hold a scale of it.
        """
        packed, factor = self._weights.packed(name), self._factors.get(name)
        if packed is None or factor is None:
            return packed
        tables = packed.levels.tables
        scale = (packed.levels.scale if tables is None else tables) * factor
        if not torch.equal(scale.to(torch.float16).to(scale.dtype), scale):
            raise UnsupportedError(
                f"{self.described(name)} has scales that fp16 cannot hold once they are multiplied "
                f"by {factor:g} (--residual-shift); use --compute-precision fp32, or give the "
                "unquantized checkpoint."
            )
        if tables is not None:
            return replace(packed, levels=replace(packed.levels, entries=scale))
        return replace(packed, levels=replace(packed.levels, scale=scale))
