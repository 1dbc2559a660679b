"""What several models foretell of one window, as numbers for each token, and as bytes.

    scores = score_window({"original": ..., "artifact": ...}, window, asked)
    scores["artifact"].columns["kl"]
    unpacked(packed(scores)) == scores

All models read a window before any reads the next, so that only one window's logits are held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import safetensors
import safetensors.torch
import torch

from llm_coreml.eval.metrics import Metric, Predictions


class Reader(Protocol):
    """What foretells a text."""

    @property
    def label(self) -> str:
        """What produces the numbers."""

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the logits after each of the tokens, float32 `[tokens, vocab]`."""


@dataclass(frozen=True, eq=False)
class ModelScores:
    """What is kept of a model's predictions of a window.

    Attributes:
        columns: By name, see `token_scores.score`.
        values: What each metric needs, by its name, 1-D.
    """

    columns: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]


def score_window(
    readers: Mapping[str, Reader], window: Sequence[int], asked: Mapping[str, Sequence[Metric]]
) -> dict[str, ModelScores]:
    """Score a window by every model.

    Args:
        readers: Models by name; those after `original`, if it is among them, are compared to it.
        window: The first token is given, the others are scored.
        asked: What to measure of each model.
    """
    targets = torch.tensor(window[1:])
    original: torch.Tensor | None = None
    found = {}
    for name, reader in readers.items():
        logits = reader.logits(window[:-1])
        read = Predictions(logits, targets, logits if original is None else original)
        values = {metric.name: metric.values(read) for metric in asked[name]}
        found[name] = ModelScores(read.scored, values)
        if name == "original":
            original = logits
    return found


def packed(scores: Mapping[str, ModelScores]) -> bytes:
    """Return scores as a safetensors file."""
    tensors: dict[str, torch.Tensor] = {}
    for model, each in scores.items():
        tensors |= {f"{model}/columns/{name}": value for name, value in each.columns.items()}
        tensors |= {f"{model}/values/{name}": value for name, value in each.values.items()}
    # A metric may return a column itself, and no two of the file share their bytes.
    data: bytes = safetensors.torch.save({name: value.clone() for name, value in tensors.items()})
    return data


def unpacked(data: bytes) -> dict[str, ModelScores]:
    """Return what `packed` was given.

    Raises:
        ValueError: the bytes are none of its.
    """
    found: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}
    try:
        for name, value in safetensors.torch.load(data).items():
            model, kind, rest = name.split("/", 2)
            found.setdefault(model, ({}, {}))[kind == "values"][rest] = value
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None
    return {model: ModelScores(*each) for model, each in found.items()}
