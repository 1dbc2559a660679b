"""A 3-gram language model, the bar that the demo model has to clear.

Interpolated modified Kneser-Ney over the demo model's own tokens. It is properly
normalised (the unigram level is mixed with the uniform distribution over the vocabulary),
so its perplexity compares directly with the network's.

Example:
    from demo_baseline import Trigram
    print(Trigram([1, 2, 3, 1, 2, 3], vocabulary_size=8).perplexity([1, 2]))
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Context = tuple[int, ...]


@dataclass
class Level:
    """The counts of one order: which tokens followed which context, and how often."""

    following: dict[Context, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))

    def __post_init__(self) -> None:
        self.totals: dict[Context, int] = {}
        self.reserved: dict[Context, float] = {}
        self.discounts = (0.0, 0.0, 0.0, 0.0)

    def finish(self) -> None:
        """Estimate the discounts of Chen and Goodman and the mass each context gives away."""
        of_count = Counter(
            min(count, 4) for tokens in self.following.values() for count in tokens.values()
        )
        n1, n2, n3, n4 = (max(of_count[n], 1) for n in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        # Few counts make the estimates stray; every order must pass some mass on.
        bounded = [min(max(0.1, e), 0.95 * n) for n, e in enumerate(estimates, start=1)]
        self.discounts = (0.0, bounded[0], bounded[1], bounded[2])
        for context, tokens in self.following.items():
            self.totals[context] = tokens.total()
            self.reserved[context] = sum(self.discounts[min(c, 3)] for c in tokens.values())

    def interpolate(self, context: Context, token: int, lower: float) -> float:
        """Mix the discounted estimate of this order with that of the order below."""
        tokens = self.following.get(context)
        if tokens is None:
            return lower
        count = tokens.get(token, 0)
        kept = max(0.0, count - self.discounts[min(count, 3)])
        return (kept + self.reserved[context] * lower) / self.totals[context]


class Trigram:
    """Interpolated modified Kneser-Ney with three orders."""

    def __init__(self, tokens: Sequence[int], vocabulary_size: int) -> None:
        self.vocabulary_size = vocabulary_size
        self.levels = (Level(), Level(), Level())
        trigrams = zip(tokens, tokens[1:], tokens[2:], strict=False)
        self._count(2, trigrams)
        # Lower orders count in how many contexts a token appeared, not how often.
        self._count(1, ((b, c) for (_, b), after in self._counts(2) for c in after))
        self._count(0, ((c,) for (_,), after in self._counts(1) for c in after))
        for level in self.levels:
            level.finish()

    def _counts(self, order: int) -> list[tuple[Context, Counter[int]]]:
        return list(self.levels[order].following.items())

    def _count(self, order: int, grams: Iterable[Context]) -> None:
        for gram in grams:
            self.levels[order].following[gram[:-1]][gram[-1]] += 1

    def probability(self, context: Context, token: int) -> float:
        """Return the probability of a token after up to two tokens of context."""
        estimate = 1.0 / self.vocabulary_size
        for order, level in enumerate(self.levels):
            if order <= len(context):
                estimate = level.interpolate(context[len(context) - order :], token, estimate)
        return estimate

    def perplexity(self, tokens: Sequence[int]) -> float:
        """Return the perplexity of tokens, each seen after the two before it."""
        total = sum(
            math.log(self.probability(tuple(tokens[max(0, i - 2) : i]), token))
            for i, token in enumerate(tokens)
        )
        return math.exp(-total / len(tokens))
