"""States of a whole decoder as the partitions of a program have them: rows of layers in a row.

own = divided({"cache_keys": keys}, {"layers_0_cache_keys": 12, "layers_12_cache_keys": 4})
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

# What the states of a partition are called: by its first layer, and as the decoder calls them.
_OF_PART = re.compile(r"layers_\d+_(.+)")


def divided(states: Mapping[str, torch.Tensor], rows: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return each partition's part of the states.

    Args:
        states: By the decoder's names, the first axis of each the layers that it is of; what a
            program has as it is may be among them.
        rows: How many layers each state of a program has, in the order of the partitions.

    Returns:
        By the program's names. What no partition has stays as it is, for whoever takes it to
        refuse; so does what has another number of layers than all partitions together.
    """
    parts: dict[str, list[str]] = {}
    for name in rows:
        found = _OF_PART.fullmatch(name)
        if found is not None and name not in states:
            parts.setdefault(found[1], []).append(name)
    given = dict(states)
    for whole, names in parts.items():
        counts = [rows[name] for name in names]
        if whole in given and len(given[whole]) == sum(counts):
            given |= dict(zip(names, torch.split(given.pop(whole), counts), strict=True))
    return given
