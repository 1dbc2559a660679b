"""Where two exported language models part on the same text, and what it costs.

found = diff(Path("out-a"), Path("out-b"))
found.first, found.layers, found.qualities[1].mean_kl
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llm_coreml.errors import ConfigError
from llm_coreml.eval.inspection import (
    DEFAULT_THRESHOLD,
    Difference,
    check_threshold,
    difference,
    halved,
)
from llm_coreml.eval.pair import read_in_pairs
from llm_coreml.eval.quality import measure_quality
from llm_coreml.eval.reading import Opened, open_artifact, read_tokens
from llm_coreml.eval.results import Quality
from llm_coreml.progress import Progress, Silent
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.reference import DECLARED

DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class Comparison:
    """What `diff` finds.

    Attributes:
        programs: The two `.pte`.
        text: Name of the text.
        tokens: Tokens read.
        mode: Numerics of both.
        device: Where they were computed.
        equal: Both have the same operations, and every value that they computed is equal.
        paired: Operations that the two have in common.
        alone: Counts of each program's other operations, by type.
        threshold: The error that `first` exceeds.
        first: The first common operation where they part, named as in the first; None if nowhere.
        layers: The common operation with the largest error of each layer.
        qualities: Perplexity of both; the second's divergence is that from the first.
    """

    programs: tuple[str, str]
    text: str
    tokens: int
    mode: str
    device: str
    equal: bool
    paired: int
    alone: tuple[dict[str, int], dict[str, int]]
    threshold: float
    first: Difference | None
    layers: tuple[Difference, ...]
    qualities: tuple[Quality, Quality]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; a figure that is inf or NaN becomes None."""
        qualities = [
            {name: _finite(value) for name, value in quality.to_json().items()}
            for quality in self.qualities
        ]
        return {**asdict(self), "qualities": qualities}


def diff(
    first: Path,
    second: Path,
    *,
    text: Path | None = None,
    ids: Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    execution: Execution = DECLARED,
    threshold: float = DEFAULT_THRESHOLD,
    checked: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Read the same tokens with both, compare their operations, then their predictions.

    Args:
        first: A bundle or `.pte`; errors are relative to it.
        second: Another, with the same vocabulary.
        text: UTF-8 file; None takes the held-out text that ships in the package.
        ids: File of tokens, instead of a text.
        tokens: Most tokens to read.
        execution: Numerics, device and memory of both.
        threshold: Relative error from which the programs count as parted.
        checked: Refuse bundles whose files have changed since the export wrote them.
        progress: Told of stages and shares.

    Raises:
        ArtifactError: an artifact is damaged, or no language model for Core ML.
        ConfigError: an argument cannot be used, or the vocabularies differ.
    """
    check_threshold(threshold)
    progress = progress or Silent()
    progress.stage("open")
    execution = halved(execution)
    one, other = (open_artifact(path, execution, checked) for path in (first, second))
    _check_vocabularies(one, other)
    name, windows = read_tokens((one, other), text, ids, tokens)
    progress.stage("compare")
    reading = read_in_pairs(one.runner, other.runner, windows, progress.advance)
    progress.stage("score")
    # The first stands in for the original, from which divergence is measured.
    runners = {"original": one.runner, "second": other.runner}
    quality = measure_quality(runners, windows, progress.advance)
    parted = reading.parting.first(threshold)
    return Comparison(
        programs=(str(one.path), str(other.path)),
        text=name,
        tokens=sum(len(window) - 1 for window in windows),
        mode=execution.mode,
        device=execution.device,
        equal=reading.equal,
        paired=reading.paired,
        alone=reading.alone,
        threshold=threshold,
        first=difference(parted) if parted else None,
        layers=tuple(map(difference, reading.parting.by_layer())),
        qualities=(replace(quality[0], name="first"), replace(quality[1], name="second")),
    )


def _check_vocabularies(one: Opened, other: Opened) -> None:
    sizes = one.runner.vocab_size, other.runner.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"'{one.path}' has a vocabulary of {sizes[0]} tokens and '{other.path}' one of "
            f"{sizes[1]}; give two exports of one model."
        )


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
