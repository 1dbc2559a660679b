"""States of a whole decoder as the partitions of a program have them: rows of layers in a row.

own = divided({"cache_keys": keys}, {"layers_0_cache_keys": 12, "layers_12_cache_keys": 4})
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from llm_coreml.errors import ArtifactError
from llm_coreml.reference.method.method import LoadedMethod
from llm_coreml.reference.program.coreml_program import CoreMLProgram

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


def own_states(method: LoadedMethod, states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the programs of a method are to remember, by their names; nothing of nothing.

    Raises:
        ArtifactError: a state is missing or unknown.
    """
    programs = method.in_a_row or method.programs
    rows = {each.name: each.shape[0] for program in programs for each in program.states}
    own = divided(states, rows)
    if states and own.keys() != rows.keys():
        raise ArtifactError(f"The states are {sorted(own)}; the program has {sorted(rows)}.")
    return own


def of_program(
    program: CoreMLProgram, states: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return those of the states that a program has."""
    own = {each.name for each in program.states}
    return {name: value for name, value in states.items() if name in own}
