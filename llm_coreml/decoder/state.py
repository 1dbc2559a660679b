"""What a kind of state is: buffers that outlive a call, what a pass sees of them, how it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef


@dataclass(frozen=True)
class Start:
    """Where a pass begins to write to a state.

    Attributes:
        place: int32 `[1]`, where the first token goes: its position, in a ring the remainder.
        length: How many tokens there are; a symbol while a program is traced.
    """

    place: torch.Tensor
    length: int


class View:
    """What the layers see of a state, and write to it, during one pass."""


class State(nn.Module, ABC):
    """What a decoder remembers of one sequence, of one kind; all buffers are fp32.

    A pass may end with pads, which repeat the last token at its position, see `Decoder.forward`:
    what it writes of them must not be seen by any later pass.

    Attributes:
        write: The custom op that an exported graph writes it with.
        ring: After how many positions a place is used again; None if each has a place of its own.
    """

    write: ClassVar[CustomOpDef]
    ring: int | None

    @abstractmethod
    def open(self, start: Start) -> View:
        """Return the view that one pass reads and updates."""

    @abstractmethod
    def close(self, view: View) -> None:
        """Keep what a pass wrote to the view that `open` gave."""

    @abstractmethod
    def lend(self, start: Start, buffers: Sequence[torch.Tensor]) -> View:
        """Return the view of a pass that is given the buffers, and keeps nothing itself."""

    @abstractmethod
    def returned(self, view: View) -> Sequence[torch.Tensor]:
        """Return what the buffers have become in a pass over what `lend` gave."""

    @abstractmethod
    def window(self) -> View:
        """Return the view of a pass over all tokens that there are: nothing before, none kept."""

    def reset(self) -> None:
        """Forget the sequence: every entry becomes zero."""
        for buffer in self.buffers():
            buffer.zero_()
