"""Settings of what the Neural Engine is reported to need of a program, each a switch of its own.

docs/neural-engine.md has the reason and the source of each. Without them a program is as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_coreml.config.profiles import Name
from llm_coreml.config.setting import Section, setting
from llm_coreml.config.values import MOST_POSITIONS
from llm_coreml.targets import Layout, NormForm, Operations


@dataclass(frozen=True)
class EngineSettings(Section):
    """What a program is made of, beyond what its target decides.

    Raises:
        ConfigError: a value breaks a rule of its own.
    """

    profile: Name = setting(
        "none",
        "Parts, padded heads, norms and attention as a system's Neural Engine is reported to need.",
    )
    layout: Layout = setting(
        "linear",
        "conv computes linear layers as 1x1 convolutions of [1, C, 1, S], channels first.",
    )
    norm: NormForm | None = setting(
        None,
        "Norms step by step, as one Euclidean norm, or as the layer norm of [x, -x].",
        shown="scaled; the profile's",
    )
    operations: Operations | None = setting(
        None,
        "fewest gives the same numbers by fewer operations of Core ML.",
        shown="usual; the profile's",
    )
    linear_split: int | None = setting(
        None,
        "Linear layers as parts of so many outputs, 8 at most: 1024 for the Neural Engine.",
        metavar="N",
        shown="whole; the profile's",
        least=32,
        most=MOST_POSITIONS,
    )
    head_split: int | None = setting(
        None,
        "No linear layer, nor part of one, gives more outputs: 16384 cuts the head of most models.",
        metavar="N",
        shown="whole; the profile's",
        least=32,
        most=MOST_POSITIONS,
    )
    gather_split: int | None = setting(
        None,
        "The token table as parts of at most so many rows: 65535 for the Neural Engine.",
        metavar="N",
        shown="whole; the profile's",
        least=32,
        most=MOST_POSITIONS,
    )
    pad_heads: bool = setting(
        False, "Keep keys and values in states whose width is a multiple of 32, with zeros behind."
    )
