"""Tables that a decoder looks positions up in, and numbers that distances are multiplied by.

    position_tables(spec, context=2048)      # {"cos": [2048, 64], "sin": ..., "growth": ...}

Made once in fp64: a program that computed them from positions would do so in fp16. Their names are
in the bytes of every program.
"""

from __future__ import annotations

import torch

from llm_coreml.decoder.rope import rope_tables
from llm_coreml.decoder.spec import DecoderSpec, QueryGrowth
from llm_coreml.decoder.states import numbered


def position_tables(spec: DecoderSpec, context: int) -> dict[str, torch.Tensor]:
    """Return all tables of a decoder by name.

    Returns:
        Float32. Cosines and sines of each rotary table, `[context, dim / 2]` each; what queries
        grow by, `[context, 1]`; slopes of ALiBi, `[heads, 1, 1]`.
    """
    found: dict[str, torch.Tensor] = {}
    for names, rope in zip(rotary_names(spec), spec.rotary, strict=True):
        found.update(zip(names, rope_tables(rope, context), strict=True))
    for growth, name in growth_names(spec, context).items():
        found[name] = _growth_table(growth, context)
    for slopes, name in slope_names(spec).items():
        found[name] = torch.tensor(slopes, dtype=torch.float64).view(-1, 1, 1)
    return {name: table.to(torch.float32) for name, table in found.items()}


def rotary_names(spec: DecoderSpec) -> list[tuple[str, str]]:
    """Return what the cosines and sines of every rotary table are called."""
    indices = range(len(spec.rotary))
    return [(numbered("cos", index), numbered("sin", index)) for index in indices]


def growth_names(spec: DecoderSpec, context: int) -> dict[QueryGrowth, str]:
    """Return what the table of each growth is called; one that begins later has none."""
    growths = (layer.mixer.query_growth for layer in spec.layers)
    present = dict.fromkeys(each for each in growths if each and each.length < context)
    return {growth: numbered("growth", index) for index, growth in enumerate(present)}


def slope_names(spec: DecoderSpec) -> dict[tuple[float, ...], str]:
    """Return what the slopes of each kind of heads are called."""
    present = dict.fromkeys(layer.mixer.alibi for layer in spec.layers if layer.mixer.alibi)
    return {slopes: numbered("slopes", index) for index, slopes in enumerate(present)}


def _growth_table(growth: QueryGrowth, context: int) -> torch.Tensor:
    """Return what queries are multiplied by at each position, float64 `[context, 1]`."""
    steps = torch.arange(context).div(growth.length, rounding_mode="floor").to(torch.float64)
    return 1 + growth.beta * torch.log1p(steps).unsqueeze(1)
