"""What a family is: three functions and the names that may be left over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_coreml.checkpoint.weights_view import Stored
from llm_coreml.decoder.spec import DecoderSpec

# Says of each parameter of a decoder which tensors it is made of.
Naming = Callable[[DecoderSpec], dict[str, Stored]]


@dataclass(frozen=True)
class Family:
    """How one architecture's files map onto the decoder.

    Attributes:
        spec: Turns a parsed `config.json` into a `DecoderSpec`; raises UnsupportedError for
            options that the decoder does not compute.
        stored: Says of each parameter of the decoder, by its name, which tensors of a checkpoint it
            is made of.
        notes: Says in sentences what a `config.json` holds that is read otherwise than it looks.
        ignored: Glob patterns of checkpoint tensors that carry nothing the decoder needs.
        other_names: The same as `stored`, under other names that the tensors have: those that
            transformers gives them in memory, where they are not those of files.
    """

    spec: Callable[[Mapping[str, Any]], DecoderSpec]
    stored: Naming
    notes: Callable[[Mapping[str, Any]], list[str]]
    ignored: tuple[str, ...] = ()
    other_names: tuple[Naming, ...] = ()
