"""Feeds a program as ExecuTorch's TextLLMRunner does, by what its constant methods say alone.

Source of the order: `extension/llm/runner` of ExecuTorch 1.5, `text_prefiller.cpp` and
`text_token_generator.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from llm_coreml.artifact.method_plan import Constant

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class StockFeeding:
    """A runner that knows a program by its constant methods.

    Attributes:
        context: Positions that there are.
        most: Tokens of one call.
        position: Of the next token.
    """

    def __init__(self, forward: Forward, constants: Mapping[str, Constant]) -> None:
        self._forward = forward
        self.position = 0
        self.context, self.most = constants["get_max_context_len"], constants["get_max_seq_len"]
        self._parallel = constants["enable_dynamic_shape"]
        assert constants["use_kv_cache"] is True

    def prefill(self, prompt: Sequence[int]) -> torch.Tensor:
        """Feed a prompt where the sequence is, and return the logits that a token is chosen by."""
        assert isinstance(self.context, int) and isinstance(self.most, int)
        assert self.position + len(prompt) <= self.context
        row = torch.empty(0)
        for start in range(0, len(prompt), self.most):
            chunk = prompt[start : start + self.most]
            for part in [chunk] if self._parallel else [[token] for token in chunk]:
                row = self._call(part)
        return row

    def decode(self, token: int) -> torch.Tensor:
        """Feed a token, and return the logits that the next one is chosen by."""
        return self._call([token])

    def _call(self, tokens: Sequence[int]) -> torch.Tensor:
        given = torch.tensor([list(tokens)], dtype=torch.int64)
        logits = self._forward(given, torch.tensor([self.position], dtype=torch.int64))
        self.position += len(tokens)
        assert logits.dtype == torch.float32 and logits.shape[:1] == (1,)
        assert logits.shape[1] in (1, len(tokens))
        return logits[0, -1]
