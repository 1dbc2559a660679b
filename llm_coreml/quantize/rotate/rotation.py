"""Rotate what flows between the layers of a decoder, by its weights alone.

    weights, spec = rotated(model.weights, model.spec, "both")      # then as any other

Outlying channels cost every other channel of a row its precision; a rotation spreads them. An
RMSNorm without a gain commutes with an orthogonal R, so each gain is moved into the layers that
read it, and R into everything that writes or reads the residual stream (QuaRot, arXiv:2404.00456;
R1 of SpinQuant, arXiv:2405.16406). Attention adds up values, each times a number, so the values of
a key/value head may be rotated where they are made and back where they are read (SpinQuant's R2).
What the decoder computes stays the same, and so do its operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import final

import torch

from llm_coreml.checkpoint.checkpoint import cast_checked
from llm_coreml.checkpoint.matrix import Packed, PackedForm
from llm_coreml.checkpoint.weights_view import Weights
from llm_coreml.config import Rotate
from llm_coreml.decoder import DecoderSpec, skeleton
from llm_coreml.decoder.spec import NormSpec
from llm_coreml.decoder.wiring import Space, Wiring
from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.rotate.hadamard import SEED, Rotation

# Values rotated at a time, in fp64.
_PIECE = 1 << 22
_TABLE, _HEAD = "embed_tokens.weight", "lm_head.weight"


def rotations(kind: Rotate, spec: DecoderSpec) -> dict[Space, Rotation]:
    """Return the rotation of each space that `kind` asks to rotate.

    Raises:
        UnsupportedError: the heads of some layers are wider than those of others, or their numbers
            are changed one by one; or a norm does not commute with a rotation.
    """
    found: dict[Space, Rotation] = {}
    if kind in ("residual", "both"):
        if any(norm.kind == "layer" or norm.bias for norm in _norms(spec)):
            raise UnsupportedError(
                f"--rotate {kind} wants norms by the root mean square alone, and this model takes "
                "off the mean or adds a bias; leave --rotate out, or give --rotate heads."
            )
        found["residual"] = Rotation(spec.hidden_size)
    if kind in ("heads", "both"):
        widths = sorted({width for layer in spec.layers for width in layer.mixer.value_widths})
        if not widths:
            raise UnsupportedError(
                f"--rotate {kind} cannot rotate the values of this model, whose numbers are "
                "changed one by one; leave --rotate out, or give --rotate residual."
            )
        if len(widths) > 1:
            raise UnsupportedError(
                f"--rotate {kind} wants heads of one width, and this model has heads of "
                f"{', '.join(map(str, widths))}; leave --rotate out, or give --rotate residual."
            )
        found["heads"] = Rotation(widths[0])
    return found


def _norms(spec: DecoderSpec) -> Iterator[NormSpec]:
    """Yield the norms through which the residual stream is read."""
    yield spec.norm
    for layer in spec.layers:
        yield from (norm for norm in (layer.mixer.norm, layer.feed_forward.norm) if norm)


def rotated(weights: Weights, spec: DecoderSpec, kind: Rotate) -> tuple[Weights, DecoderSpec]:
    """Return rotated weights for a decoder of the same function, and its sizes.

    With the residual stream rotated, a tied head gets weights of its own: the gain of the last norm
    goes into the head, and not into the token table.

    Raises:
        UnsupportedError: there is a parameter whose place among the layers is not known here.
    """
    if kind == "none":
        return weights, spec
    found = rotations(kind, spec)
    apart = "residual" in found and spec.tie_word_embeddings
    wiring = skeleton(spec).wiring
    turned = RotatedWeights(weights, wiring, found, {_HEAD: _TABLE} if apart else {})
    return turned, replace(spec, tie_word_embeddings=spec.tie_word_embeddings and not apart)


@final
class RotatedWeights(Weights):
    """Weights that are rotated when they are read, in fp64, to fp32.

    Args:
        weights: As they were.
        wiring: What the decoder's matrices read and write.
        found: The rotation of each space.
        copies: Parameters that are made of another one's values, such as a head once tied.
    """

    def __init__(
        self,
        weights: Weights,
        wiring: Wiring,
        found: Mapping[Space, Rotation],
        copies: Mapping[str, str],
    ) -> None:
        self._weights = weights
        self._matrices = wiring.matrices
        self._norms = wiring.norms
        self._rotations = found
        self._copies = copies
        known = {*self._matrices, *self._norms, *wiring.inner}
        for name in sorted(self.names()) if "residual" in found else ():
            if _owner(name) not in known:
                raise UnsupportedError(
                    f"--rotate does not know what {self._weights.described(name)} is multiplied "
                    "with; leave --rotate out for this family."
                )

    def names(self) -> frozenset[str]:
        """Return the names of all parameters, that of a head once tied among them."""
        return self._weights.names() | self._copies.keys()

    def dtype(self, name: str) -> torch.dtype:
        """Return fp32, for every parameter is computed."""
        return torch.float32

    def described(self, name: str) -> str:
        """Return what `name` is made from."""
        return f"{self._weights.described(self._source(name))} (rotated)"

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read one parameter and rotate it."""
        return cast_checked(self._rotated(name), dtype, self.described(name))

    def sha256(self, names: Collection[str]) -> str:
        """Return a hash of what rotated parameters follow from, their norms' gains included."""
        norms = {norm for name in names if (norm := self._norm(name)) is not None}
        made = self._weights.sha256({*map(self._source, names), *norms})
        turns = {space: (rotation.label, SEED) for space, rotation in self._rotations.items()}
        return hashlib.sha256(
            repr((made, sorted(names), sorted(turns.items()))).encode()
        ).hexdigest()

    def forms(self) -> Mapping[str, PackedForm]:
        """Return nothing: what is quantized already is not rotated."""
        return MappingProxyType({})

    def packed(self, name: str) -> Packed | None:
        """Return None, see `forms`."""
        return None

    def _source(self, name: str) -> str:
        return self._copies.get(name, name)

    def _rotated(self, name: str) -> torch.Tensor:
        values = self._weights.tensor(self._source(name), torch.float32)
        matrix = self._matrices.get(_owner(name))
        if matrix is None:
            moved = "residual" in self._rotations and _owner(name) in self._norms
            return torch.ones_like(values) if moved else values
        inputs, outputs = self._rotation(matrix.reads), self._rotation(matrix.writes)
        if name.endswith(".bias"):
            _turn(values[None], outputs)
        elif name == _TABLE:
            _turn(values, outputs)
        else:
            _turn(values, inputs, self._gain(name) if inputs is not None else None)
            _turn(values.T, outputs)
        return values

    def _rotation(self, space: Space | None) -> Rotation | None:
        return None if space is None else self._rotations.get(space)

    def _norm(self, name: str) -> str | None:
        """Return the gain of the norm through which a matrix reads the residual stream."""
        matrix = self._matrices.get(_owner(name))
        if matrix is None or matrix.norm is None or name.endswith(".bias"):
            return None
        gain = f"{matrix.norm}.weight"
        return gain if gain in self._weights.names() else None

    def _gain(self, name: str) -> torch.Tensor | None:
        """Return that gain as fp64."""
        norm = self._norm(name)
        return None if norm is None else self._weights.tensor(norm, torch.float32).to(torch.float64)


def _turn(
    values: torch.Tensor, rotation: Rotation | None, gain: torch.Tensor | None = None
) -> None:
    """Multiply the last axis of fp32 `values` by `gain` and rotate it, in place."""
    if rotation is None:
        return
    for piece in torch.split(values, max(1, _PIECE // values.shape[1])):
        wide = piece.to(torch.float64)
        piece.copy_(rotation.apply(wide if gain is None else wide * gain))


def _owner(name: str) -> str:
    """Return the module of a parameter."""
    return name.rpartition(".")[0]
