"""Rows of which a program gives the likeliest tokens alone.

logits = spread(values, ids, vocab_size)      # what is not given is -inf
"""

from __future__ import annotations

import math

import torch

from llm_coreml.errors import ArtifactError


def spread(values: torch.Tensor, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return rows of logits with `values` at `ids`, and -inf elsewhere.

    A softmax over them is that of the tokens that are given.

    Args:
        values: Any float type, `[1, rows, K]`.
        ids: Their tokens, int32 of the same shape.
        vocab_size: How many tokens there are.

    Returns:
        float32 `[1, rows, vocab_size]`.

    Raises:
        ArtifactError: a token is none of the vocabulary, or is there twice in a row.
    """
    places = ids.to(torch.int64)
    ordered = places.sort(-1).values
    if bool(((places < 0) | (places >= vocab_size)).any()) or bool((ordered.diff() == 0).any()):
        raise ArtifactError(
            f"The program gives tokens that are not different ones below {vocab_size}; export it "
            "again, and report the model if that fails too."
        )
    rows = torch.full((*values.shape[:-1], vocab_size), -math.inf)
    return rows.scatter_(-1, places, values.to(torch.float32))
