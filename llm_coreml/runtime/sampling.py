"""Choosing the next token from a row of logits.

Sampler(Sampling(temperature=0.8, top_p=0.95, seed=1)).choose(logits)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llm_coreml.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else by nucleus (arXiv 1904.09751).

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Share of probability from which to draw, most likely tokens first.
        seed: Makes draws repeatable.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        temperature, top_p, seed = self.temperature, self.top_p, self.seed
        # NaN is in no range.
        if not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
            raise ConfigError(f"temperature is {temperature}; it must be finite and 0 or more.")
        if not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
            raise ConfigError(f"top_p is {top_p}; it must lie above 0 and be at most 1.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ConfigError("seed must be a whole number from 0 to 9223372036854775807.")


GREEDY = Sampling()


class Sampler:
    """Chooses the tokens of one text.

    Args:
        sampling: How.
    """

    def __init__(self, sampling: Sampling = GREEDY) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether it takes the most likely token."""
        return self._temperature == 0

    def choose(self, logits: torch.Tensor) -> int:
        """Return one token for float logits `[vocab]`.

        Raises:
            ArtifactError: they are no numbers.
        """
        if logits.isnan().any():
            raise ArtifactError(
                "The program's logits are no numbers (NaN), so that no token is more likely than "
                "another; `llm-coreml inspect --numerics` finds where that begins."
            )
        if self.greedy:
            return int(logits.argmax())
        # The largest at zero, so that no temperature is too small to divide by.
        logits = logits.to(torch.float64)
        probabilities = torch.softmax((logits - logits.max()) / self._temperature, dim=-1)
        ordered, tokens = probabilities.sort(descending=True)
        # The token that crosses the threshold still belongs to the nucleus.
        ordered[ordered.cumsum(0) - ordered >= self._top_p] = 0.0
        return int(tokens[torch.multinomial(ordered, 1, generator=self._generator)])
