"""Score the demo model on text: perplexity, loss by position, and 4/3/2-bit weights.

The protocol is the one the toolkit uses elsewhere: consecutive windows, each beginning
with the begin-of-text token and as long as the model's context, every other token scored.

Example:
    from demo_evaluation import score
    print(score(model, token_ids, bos=0, window=1024).perplexity)
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

WINDOWS_PER_BATCH = 4


@dataclass(frozen=True)
class Score:
    """Sums of the loss in nats over every scored token, kept by position in the window."""

    loss_by_position: Tensor
    count_by_position: Tensor

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.count_by_position.sum())

    @property
    def nats(self) -> float:
        """Total loss."""
        return float(self.loss_by_position.sum())

    @property
    def loss(self) -> float:
        """Mean loss of a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return math.exp(self.loss)

    def mean_by_position(self, bucket: int) -> list[float]:
        """Return the mean loss of each stretch of `bucket` positions."""
        stretches = [
            slice(start, start + bucket) for start in range(0, len(self.loss_by_position), bucket)
        ]
        return [
            float(self.loss_by_position[part].sum() / self.count_by_position[part].sum())
            for part in stretches
        ]


def windows(tokens: Sequence[int], bos: int, window: int) -> list[Tensor]:
    """Cut tokens into consecutive windows that each begin with `bos`."""
    step = window - 1
    return [
        torch.tensor([bos, *tokens[start : start + step]]) for start in range(0, len(tokens), step)
    ]


@torch.inference_mode()
def score(model: LlamaForCausalLM, tokens: Sequence[int], bos: int, window: int) -> Score:
    """Score every token once, in fp32."""
    model.train(False)
    losses = torch.zeros(window - 1, dtype=torch.float64)
    counts = torch.zeros(window - 1, dtype=torch.float64)
    pieces = windows(tokens, bos, window)
    full = [piece for piece in pieces if len(piece) == window]
    batches = [
        torch.stack(full[start : start + WINDOWS_PER_BATCH])
        for start in range(0, len(full), WINDOWS_PER_BATCH)
    ]
    batches += [piece[None] for piece in pieces if len(piece) < window]
    for batch in batches:
        logits = model(input_ids=batch).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.float().transpose(1, 2), batch[:, 1:], reduction="none"
        )
        losses[: loss.shape[1]] += loss.double().sum(0)
        counts[: loss.shape[1]] += len(batch)
    return Score(losses, counts)


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Quantize each group of a row symmetrically and return the values it stands for."""
    levels = 2 ** (bits - 1)
    grouped = weight.reshape(weight.shape[0], -1, group)
    scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (levels - 0.5)
    codes: Tensor = (grouped / scale).round().clamp(-levels, levels - 1)
    restored: Tensor = codes * scale
    return restored.reshape_as(weight)


def quantized(model: LlamaForCausalLM, bits: int, group: int) -> LlamaForCausalLM:
    """Return a copy of the model whose linear layers in the blocks are quantized."""
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for module in clone.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(round_to_nearest(module.weight, bits, group))
    return clone
