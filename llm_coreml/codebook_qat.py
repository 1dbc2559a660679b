"""Training with codebooks: linear layers whose weights are entries of tables as they are used.

    quantize_(model, CodebookQATConfig(Codebook(bits=3), step="prepare"), filter)

The layer is torchao's `FakeQuantizedLinear`; its quantizer is of this module. The gradient of what
a weight is rounded to is taken for the weight's own (straight-through estimator; Bengio et al.,
2013, arXiv:1308.3432). Once for each change of a weight its tables are refreshed: an entry becomes
the mean of the weights that are nearest to it (a step of Lloyd's), so that it moves by their mean
gradient. Tables are fp16 numbers throughout, and a file holds the very ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torchao.core.config import AOBaseConfig
from torchao.quantization.qat.fake_quantize_config import FakeQuantizeConfigBase
from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase
from torchao.quantization.qat.linear import FakeQuantizedLinear
from torchao.quantization.transform_module import register_quantize_module_handler

from llm_coreml.checkpoint.packed.codebook_format import (
    as_blocks,
    entries_of,
    groups_of,
    nearest,
)
from llm_coreml.errors import UnsupportedError
from llm_coreml.quantize.formats.kmeans import kmeans
from llm_coreml.quantize.formats.schemes import Codebook


@dataclass(frozen=True)
class CodebookFakeQuantizeConfig(FakeQuantizeConfigBase):  # type: ignore[misc]
    """What a quantizer rounds to, for torchao.

    Attributes:
        scheme: The format, with entries of one weight and without a scale of rows.
    """

    scheme: Codebook


@dataclass(frozen=True)
class CodebookQATConfig(AOBaseConfig):  # type: ignore[misc]
    """What `torchao.quantization.quantize_` makes of linear layers.

    Attributes:
        scheme: As in `CodebookFakeQuantizeConfig`.
        step: `prepare` puts layers in whose weights are rounded as they are used; `convert` gives
            these the rounded weights, beside which the tables stay.
    """

    scheme: Codebook
    step: Literal["prepare", "convert"]


class CodebookFakeQuantizer(FakeQuantizerBase):  # type: ignore[misc]
    """Rounds one weight to entries of its tables.

    Attributes:
        config: The format.
        enabled: Whether it rounds at all; torchao's switch.
        tables: fp16 `[row_groups, column_groups, 2**bits]`, ascending; a buffer, which is saved.

    Args:
        scheme: The format.
        weight: Any floating type `[out, in]`, from which the first tables are made.

    Raises:
        UnsupportedError: the format does not divide the weight, or fp16 cannot hold it.
    """

    tables: torch.Tensor

    def __init__(self, scheme: Codebook, weight: torch.Tensor) -> None:
        super().__init__()
        self.config = CodebookFakeQuantizeConfig(scheme)
        self.enabled = True
        rows, columns = weight.shape
        scheme.check("A linear layer", (rows, columns))
        groups = scheme.tables((rows, columns))
        tables, _ = kmeans(as_blocks(weight.detach(), groups), scheme.bits)
        self.register_buffer("tables", tables.view(*groups, -1).to(torch.float16))
        self._seen = weight._version

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what `weight` is rounded to, of its type; in training, tables follow it first."""
        if not self.enabled:
            return weight
        # Not at each call: a pass that checkpointing repeats must meet the tables of the first,
        # which may be without gradients.
        if self.training and weight._version != self._seen:
            self.refresh(weight)
        rounded: torch.Tensor = _Rounded.apply(weight, self.tables)  # type: ignore[no-untyped-call]
        return rounded

    @torch.no_grad()
    def refresh(self, weight: torch.Tensor) -> None:
        """Make each entry the mean of the weights that are nearest to it; without any it stays."""
        groups = groups_of(self.tables)
        blocks = as_blocks(weight.detach().to(torch.float32), groups)
        codes = as_blocks(nearest(weight, self.tables), groups).to(torch.int64)
        held = self.tables.flatten(0, 1).to(torch.float32)
        # Of distances, which lose nothing in sums of fp32 where weights lie at their entries.
        off = blocks - held.gather(1, codes)
        sums = torch.zeros_like(held).scatter_add_(1, codes, off)
        counts = torch.zeros_like(held).scatter_add_(1, codes, torch.ones_like(off))
        means = (held + sums / counts.clamp(min=1)).cummax(1).values
        self.tables.copy_(means.to(torch.float16).view(self.tables.shape))
        self._seen = weight._version


class _Rounded(torch.autograd.Function):
    """Entries for weights; the gradient passes as if these were the weights."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        return entries_of(nearest(weight, tables), tables).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@register_quantize_module_handler(CodebookQATConfig)  # type: ignore[untyped-decorator]
def _changed(module: torch.nn.Module, config: CodebookQATConfig) -> torch.nn.Module:
    """Return what a linear layer becomes; see `CodebookQATConfig`."""
    quantizer = getattr(module, "weight_fake_quantizer", None)
    if config.step == "convert":
        if isinstance(quantizer, CodebookFakeQuantizer):
            with torch.no_grad():
                own = module.get_parameter("weight")
                own.copy_(entries_of(nearest(own, quantizer.tables), quantizer.tables))
        return module
    assert isinstance(module, torch.nn.Linear)
    weight = module.weight
    if type(weight) is not torch.nn.Parameter or not weight.is_floating_point() or weight.is_meta:
        raise UnsupportedError(
            "Training with codebooks begins with plain weights in memory, and a linear layer has "
            f"{'none' if weight.is_meta else 'others'}: load the model unquantized, without "
            "offloading, on one process."
        )
    made: torch.nn.Module = FakeQuantizedLinear.from_linear(module)
    made.weight_fake_quantizer = CodebookFakeQuantizer(config.scheme, weight)
    return made.train(module.training)
