"""OLMo 3: OLMo 2 with windows on three layers of four, and scaled rotary tables on the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_coreml.decoder.spec import DecoderSpec
from llm_coreml.families import olmo2
from llm_coreml.families.dense import Dense
from llm_coreml.families.fields import number
from llm_coreml.families.layered import in_turn, tables_of, turns
from llm_coreml.families.windows import sliding_window

# transformers' own defaults where config.json is silent.
_DEFAULTS = {**olmo2.DEFAULTS, "sliding_window": 4096}
_THETA = 500000.0


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Read an OLMo 3 `config.json`.

    Raises:
        CheckpointError: see `llama.spec`.
        UnsupportedError: see `llama.spec`.
    """
    read = Dense({**_DEFAULTS, **config})
    # A base beside the sizes is that of layers that see all; transformers looks at it once.
    full = number(config, "rope_theta", _THETA)
    rotary = tables_of(config, read.head_dim, read.positions, full, sliding=_THETA)
    seen = turns(
        {**read.config, "sliding_window_pattern": 4}, read.count, sliding_window(read.config), 4
    )
    return read.decoder(in_turn(olmo2.layer(read), seen), rotary)


FAMILY = replace(olmo2.FAMILY, spec=spec)
