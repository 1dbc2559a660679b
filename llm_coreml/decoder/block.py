"""The block that joins attention and MLP."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import torch
from torch import nn

from llm_coreml.decoder.carried import Carried, Entries, Layout
from llm_coreml.decoder.chunk import Chunk
from llm_coreml.decoder.matrices import number
from llm_coreml.decoder.mlp import MLP
from llm_coreml.decoder.norm import RMSNorm, norm_of
from llm_coreml.decoder.per_layer import PerLayerMLP
from llm_coreml.decoder.self_attention import Attention, AttentionForm
from llm_coreml.decoder.spec import DecoderSpec, NormSpec
from llm_coreml.decoder.states import Slot
from llm_coreml.decoder.wiring import Halt, Steps, Wiring, joined, run
from llm_coreml.targets import Operations


class Block(nn.Module):
    """One decoder layer: attention and MLP, each between norms and added to the residual.

    They follow one another, or read the same residual stream where the layer is `parallel`.

    Args:
        spec: Of the decoder.
        index: Which of its layers.
        slot: The part of the states that the layer owns.
        form: See `Attention`.
        operations: See `Attention`.
    """

    residual_multiplier: torch.Tensor | None

    def __init__(
        self,
        spec: DecoderSpec,
        index: int,
        slot: Slot,
        form: AttentionForm,
        operations: Operations = "usual",
    ) -> None:
        super().__init__()
        layer, hidden = spec.layers[index], spec.hidden_size
        self.input_layernorm = _norm(hidden, layer.mixer.norm)
        kept_as = index if index in spec.shared else None
        self.self_attn = Attention(layer.mixer, hidden, slot, form, kept_as, operations)
        self.post_attention_layernorm = _norm(hidden, layer.feed_forward.norm)
        self.mlp = MLP(layer.feed_forward, hidden)
        self.attention_out_norm = _norm(hidden, layer.mixer.out_norm)
        self.mlp_out_norm = _norm(hidden, layer.feed_forward.out_norm)
        self.register_buffer("residual_multiplier", number(spec.residual_multiplier, 1.0), False)
        self.per_layer: PerLayerMLP | None = None
        self.per_layer_out_norm: RMSNorm | None = None
        if spec.per_layer is not None:
            self.per_layer = PerLayerMLP(spec.per_layer, hidden)
            self.per_layer_out_norm = _norm(hidden, spec.per_layer.norm)
        scalar = nn.Parameter(torch.ones(1), requires_grad=False) if layer.scaled else None
        self.layer_scalar = scalar
        self.entering, self.leaving = Layout.of(spec, index), Layout.of(spec, index + 1)
        self.parallel, self.sums_normed = layer.parallel, layer.sums_normed

    @property
    def wiring(self) -> Wiring:
        """What each matrix reads and writes. A norm of what is written lets no rotation pass."""
        attention = None if self.input_layernorm is None else "input_layernorm"
        mlp = None if self.post_attention_layernorm is None else "post_attention_layernorm"
        if self.parallel and mlp is None:
            mlp = attention
        parts = [
            self.self_attn.wiring.inside("self_attn").behind(attention),
            self.mlp.wiring.inside("mlp").behind(mlp),
        ]
        if self.per_layer is not None:
            parts.append(self.per_layer.wiring.inside("per_layer"))
        return joined(*parts)

    def forward(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Map what enters to what leaves, each as its `Layout` has it: `[1, S, hidden]` mostly."""
        return run(self.steps(x, chunk))

    def steps(self, x: torch.Tensor, chunk: Chunk) -> Steps:
        """Do what `forward` does, halting before the matrices of each stage of `wiring`."""
        leaving = yield from self.through(self.entering.taken_apart(x), chunk)
        return self.leaving.put_together(leaving)

    def through(self, carried: Carried, chunk: Chunk) -> Generator[Halt, torch.Tensor, Carried]:
        """Do what `steps` does with what enters taken apart."""
        # No change of `x` has a name here: while a text stays halted, it would be kept.
        x, heads = carried.stream, dict(carried.heads)
        if self.parallel:
            x = yield from self._side_by_side(x, chunk, heads)
        else:
            mixer = self.self_attn.steps(_behind(self.input_layernorm, x), chunk, heads)
            x = self._changed(x, (yield from mixer), self.attention_out_norm)
            mlp = self.mlp.steps(_behind(self.post_attention_layernorm, x))
            x = self._changed(x, (yield from mlp), self.mlp_out_norm)
        if self.per_layer is not None:
            added = self.per_layer.steps(x, carried.parts[0])
            x = self._changed(x, (yield from added), self.per_layer_out_norm)
        if self.layer_scalar is not None:
            x = x * self.layer_scalar
        return Carried(x, carried.parts[1:], heads)

    def _side_by_side(self, x: torch.Tensor, chunk: Chunk, heads: dict[int, Entries]) -> Steps:
        """Do what `through` does to the residual stream in a parallel layer."""
        read = _behind(self.input_layernorm, x)
        if self.post_attention_layernorm is None:
            read = _behind(None, read())  # computed once for both
        attended = yield from self.self_attn.steps(read, chunk, heads)
        changed = self._changed(x, attended, self.attention_out_norm)
        if self.post_attention_layernorm is not None:
            read = _behind(self.post_attention_layernorm, x)
        return self._changed(changed, (yield from self.mlp.steps(read)), self.mlp_out_norm)

    def _changed(self, x: torch.Tensor, change: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        if norm is not None and not self.sums_normed:
            change = norm(change)
        if self.residual_multiplier is not None:
            change = change * self.residual_multiplier
        return norm(x + change) if norm is not None and self.sums_normed else x + change


def _norm(size: int, spec: NormSpec | None) -> RMSNorm | None:
    return None if spec is None else norm_of(spec, size)


def _behind(norm: RMSNorm | None, x: torch.Tensor) -> Halt:
    return (lambda: x) if norm is None else partial(norm, x)
