"""What systems' Neural Engines are reported to need, as sets of settings.

PROFILES["ane-ios26"].attention          # 'decomposed'

Sources are in docs/neural-engine.md. No device has taken part in choosing any of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from llm_coreml.cuts import WHOLE, Cuts
from llm_coreml.targets import NormForm, Operations

Name = Literal["none", "ane-ios18", "ane-ios26"]


@dataclass(frozen=True)
class Profile:
    """Settings that hold where none are given.

    Attributes:
        cuts: Which matrices are cut; the head and the token table alike, so that tied ones are
            stored once.
        pad_heads: Whether the widths of states are multiples of 32.
        attention: Which form it has; None is the target's.
        norm: Which form norms have in programs of one length; None is the usual one.
        operations: Whether they are as few as are known.
    """

    cuts: Cuts = WHOLE
    pad_heads: bool = False
    attention: Literal["fused", "decomposed"] | None = None
    norm: NormForm | None = None
    operations: Operations = "usual"


_PARTS = Cuts(linear=1024, widest=16384, gather=16384)
PROFILES: Mapping[Name, Profile] = MappingProxyType(
    {
        "none": Profile(),
        "ane-ios18": Profile(_PARTS, True, "fused", "layer", "fewest"),
        "ane-ios26": Profile(_PARTS, True, "decomposed", "l2", "fewest"),
    }
)
