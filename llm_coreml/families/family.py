"""What a family is: two functions and the names that may be left over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec


@dataclass(frozen=True)
class Family:
    """How one architecture's files map onto the decoder.

    Attributes:
        spec: Turns a parsed `config.json` into a `DecoderSpec`; raises UnsupportedError for
            options that the decoder does not compute.
        tensor_names: Maps the decoder's parameter names to the checkpoint's.
        ignored: Glob patterns of checkpoint tensors that carry nothing the decoder needs.
    """

    spec: Callable[[Mapping[str, Any]], DecoderSpec]
    tensor_names: Callable[[DecoderSpec], dict[str, str]]
    ignored: tuple[str, ...] = ()
