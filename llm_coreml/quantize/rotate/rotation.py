"""Rotate what flows between the layers of a decoder, by its weights alone.

    checkpoint, spec = rotated(checkpoint, family, spec, "both")    # then as any other

Outlying channels cost every other channel of a row its precision; a rotation spreads them. An
RMSNorm without a gain commutes with an orthogonal R, so each gain is moved into the layers that
read it, and R into everything that writes or reads the residual stream (QuaRot, arXiv:2404.00456;
R1 of SpinQuant, arXiv:2405.16406). Attention adds up values, each times a number, so the values of
a key/value head may be rotated where they are made and back where they are read (SpinQuant's R2).
What the decoder computes stays the same, and so do its operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from llm_coreml.checkpoint import Checkpoint
from llm_coreml.config import Rotate
from llm_coreml.decoder import DecoderSpec
from llm_coreml.errors import UnsupportedError
from llm_coreml.families import Family
from llm_coreml.quantize.rotate.hadamard import Rotation

Space = Literal["residual", "heads"]
# Values rotated at a time, in fp64.
_PIECE = 1 << 22


@dataclass(frozen=True)
class _Matrix:
    """What lies on the two sides of a matrix.

    Attributes:
        inputs: The space that its inputs are of, None if it is not rotated.
        outputs: The space of its outputs.
        norm: Whose gain its inputs are multiplied by.
    """

    inputs: Space | None = None
    outputs: Space | None = None
    norm: str | None = None


_MATRICES: Mapping[str, _Matrix] = MappingProxyType(
    {
        "embed_tokens": _Matrix("residual"),
        "self_attn.q_proj": _Matrix("residual", norm="input_layernorm"),
        "self_attn.k_proj": _Matrix("residual", norm="input_layernorm"),
        "self_attn.v_proj": _Matrix("residual", "heads", norm="input_layernorm"),
        "self_attn.o_proj": _Matrix("heads", "residual"),
        "mlp.gate_proj": _Matrix("residual", norm="post_attention_layernorm"),
        "mlp.up_proj": _Matrix("residual", norm="post_attention_layernorm"),
        "mlp.down_proj": _Matrix(outputs="residual"),
        "lm_head": _Matrix("residual", norm="norm"),
    }
)
_NORMS = frozenset(matrix.norm for matrix in _MATRICES.values() if matrix.norm is not None)


def rotations(kind: Rotate, spec: DecoderSpec) -> dict[Space, Rotation]:
    """Return the rotation of each space that `kind` asks to rotate."""
    found: dict[Space, Rotation] = {}
    if kind in ("residual", "both"):
        found["residual"] = Rotation(spec.hidden_size)
    if kind in ("heads", "both"):
        found["heads"] = Rotation(_head_dim(spec))
    return found


def _head_dim(spec: DecoderSpec) -> int:
    (size,) = {layer.mixer.head_dim for layer in spec.layers}
    return size


def rotated(
    checkpoint: Checkpoint, family: Family, spec: DecoderSpec, kind: Rotate
) -> tuple[Checkpoint, DecoderSpec]:
    """Return a checkpoint of the same function with rotated weights, and its sizes.

    With the residual stream rotated, a tied head gets weights of its own: the gain of the last norm
    goes into the head, and not into the token table.

    Raises:
        UnsupportedError: the family has a tensor whose place among the layers is not known here.
    """
    if kind == "none":
        return checkpoint, spec
    turned = RotatedCheckpoint(checkpoint, family, spec, rotations(kind, spec))
    return turned, turned.spec


class RotatedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are rotated when they are read, in fp64, to fp32.

    Attributes:
        spec: Sizes of the rotated decoder.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        spec: DecoderSpec,
        found: Mapping[Space, Rotation],
    ) -> None:
        self.config = checkpoint.config
        self.generation_config = checkpoint.generation_config
        self.source = checkpoint.source
        self.tokenizer_files = checkpoint.tokenizer_files
        self.spec = replace(spec, tie_word_embeddings=False) if "residual" in found else spec
        self._checkpoint = checkpoint
        self._rotations = found
        self._theirs = family.tensor_names(self.spec)
        self._ours = {theirs: ours for ours, theirs in self._theirs.items()}
        self._source = {name: name for name in self._ours}
        if self.spec != spec and spec.tie_word_embeddings:
            self._source[self._theirs["lm_head.weight"]] = self._theirs["embed_tokens.weight"]
        for ours, theirs in self._theirs.items():
            if _part(ours) not in _MATRICES.keys() | _NORMS:
                raise UnsupportedError(
                    f"--rotate does not know what '{theirs}' is multiplied with; leave --rotate "
                    "out for this family."
                )

    def names(self) -> frozenset[str]:
        """Return what the family names; nothing shares its storage."""
        return frozenset(self._ours)

    def tied(self) -> dict[str, str]:
        """Return nothing: a tied head has its own weights, or no name."""
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`, which a rotation keeps."""
        return self._checkpoint.shape(self._source[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return fp32, for every tensor is computed."""
        return torch.float32

    def where(self, name: str) -> str:
        """Return the file of the tensor that `name` is made from."""
        return f"{self._checkpoint.where(self._source[name])} (rotated)"

    def save_tokenizer(self, folder: Path) -> dict[str, Path]:
        """Write the tokenizer's files."""
        return self._checkpoint.save_tokenizer(folder)

    def stored(self, name: str) -> torch.Tensor:
        """Read one tensor and rotate it."""
        ours = self._ours[name]
        values = self._checkpoint.tensor(self._source[name], torch.float32)
        part = _part(ours)
        if part in _NORMS:
            return torch.ones_like(values) if "residual" in self._rotations else values
        matrix = _MATRICES[part]
        outputs = self._rotation(matrix.outputs)
        if ours.endswith(".bias"):
            _turn(values[None], outputs)
            return values
        if (inputs := self._rotation(matrix.inputs)) is not None:
            _turn(values, inputs, self._gain(ours, matrix))
        _turn(values.T, outputs)
        return values

    def _rotation(self, space: Space | None) -> Rotation | None:
        return None if space is None else self._rotations.get(space)

    def _gain(self, ours: str, matrix: _Matrix) -> torch.Tensor | None:
        """Return the weight, fp64, of the norm through which a matrix reads the residual stream."""
        if matrix.norm is None:
            return None
        block = ours.removesuffix(f"{_part(ours)}.weight")
        norm = self._theirs[f"{block}{matrix.norm}.weight"]
        return self._checkpoint.tensor(norm, torch.float32).to(torch.float64)


def _turn(
    values: torch.Tensor, rotation: Rotation | None, gain: torch.Tensor | None = None
) -> None:
    """Multiply the last axis of fp32 `values` by `gain` and rotate it, in place."""
    if rotation is None:
        return
    for piece in torch.split(values, max(1, _PIECE // values.shape[1])):
        wide = piece.to(torch.float64)
        piece.copy_(rotation.apply(wide if gain is None else wide * gain))


def _part(ours: str) -> str:
    """Return the module of a parameter, without its block: `self_attn.q_proj`."""
    module = ours.rpartition(".")[0]
    return module.split(".", 2)[2] if module.startswith("layers.") else module
