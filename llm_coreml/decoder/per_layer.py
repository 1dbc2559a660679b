"""A second token table, of which every layer is given a part (as Gemma 3n and 4 have it).

`PerLayerInputs` stands before the blocks, `PerLayerMLP` in each. Read in transformers'
`modeling_gemma4.py`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from llm_coreml.decoder.matrices import Embedding, Linear, number
from llm_coreml.decoder.mlp import ACTIVATIONS
from llm_coreml.decoder.norm import RMSNorm
from llm_coreml.decoder.spec import PerLayerSpec
from llm_coreml.decoder.wiring import Matrix, Steps, Wiring


class PerLayerInputs(nn.Module):
    """What the layers are given of each token.

    Args:
        spec: Sizes and options.
        hidden_size: Width of the residual stream.
        count: Layers.
    """

    table_multiplier: torch.Tensor
    products_multiplier: torch.Tensor
    sum_multiplier: torch.Tensor

    def __init__(self, spec: PerLayerSpec, hidden_size: int, count: int) -> None:
        super().__init__()
        self.spec = spec
        self.count = count
        self.embed_tokens = Embedding(spec.vocab_size, count * spec.width)
        self.projection = Linear(hidden_size, count * spec.width, bias=False)
        self.norm = RMSNorm(spec.width, spec.norm.eps)
        for name, factor in (
            ("table_multiplier", spec.table_multiplier),
            ("products_multiplier", spec.products_multiplier),
            ("sum_multiplier", spec.sum_multiplier),
        ):
            self.register_buffer(name, number(factor, None), persistent=False)

    @property
    def wiring(self) -> Wiring:
        """What each matrix reads and writes: the layers' parts are no space of others."""
        stages = ((Matrix("embed_tokens"),), (Matrix("projection", reads="residual"),))
        return Wiring(stages, ("norm",))

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the parts of all layers side by side, `[1, S, layers * width]`.

        Args:
            x: What the first block gets, `[1, S, hidden]`.
            rows: Of the table, `[1, S, layers * width]`.
        """
        shape = (1, -1, self.count, self.spec.width)
        products = self.projection(self.projection.arrange(x)) * self.products_multiplier
        parts = self.norm(products.view(shape)) + rows.view(shape) * self.table_multiplier
        scaled: torch.Tensor = parts * self.sum_multiplier
        return scaled.flatten(2)


class PerLayerMLP(nn.Module):
    """What a layer adds of its part: `out(act(gate(x)) * part)`.

    Args:
        spec: Sizes and options.
        hidden_size: Width of the residual stream.
    """

    def __init__(self, spec: PerLayerSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate_proj = Linear(hidden_size, spec.width, bias=False)
        self.out_proj = Linear(spec.width, hidden_size, bias=False)

    @property
    def wiring(self) -> Wiring:
        """What each matrix reads and writes."""
        gate, out = Matrix("gate_proj", reads="residual"), Matrix("out_proj", writes="residual")
        return Wiring(((gate,), (out,)))

    def steps(self, x: torch.Tensor, part: torch.Tensor) -> Steps:
        """Map `x` `[1, S, hidden]` and the layer's part `[1, S, width]` to `[1, S, hidden]`."""
        inner = yield partial(self._inner, (yield lambda: x), part)
        return self.out_proj(self.out_proj.arrange(inner))  # type: ignore[no-any-return]

    def _inner(self, x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(self.gate_proj.arrange(x))
        return ACTIVATIONS[self.spec.activation](gate) * part
