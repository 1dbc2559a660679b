"""A model of every family, lowered: unquantized for the GPU, the next at four bits for the NE.

Features are lowered in `tests/lower/test_lowered_options.py`, each in both forms; here are whole
families, of which the lowering knows nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts import UNQUANTIZED, feed, lower
from family_table import TABLE, checkpoint
from llm_coreml.config import ExportConfig
from llm_coreml.reference.program.execution import Execution
from llm_coreml.runtime.eager import EagerRunner
from llm_coreml.runtime.reference import ReferenceRunner
from tiny import random_split, tokens_for

CONTEXT = 64
LENGTHS = (1, 8)
# Of the largest logit of a row.
BOUND = 1e-3
SETTINGS: tuple[dict[str, Any], ...] = (
    {"target": "gpu", **UNQUANTIZED},
    {"target": "ane", "bits": 4, "group_size": 8},
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", TABLE)
def test_a_family_is_lowered(family: str, tmp_path: Path) -> None:
    settings = SETTINGS[list(TABLE).index(family) % len(SETTINGS)]
    *_, case = TABLE[family].cases.values()
    checkpoint(tmp_path, family, case)
    config = ExportConfig(context=CONTEXT, seq_lengths=LENGTHS, logits="all", **settings)
    artifact = lower(tmp_path, config, tmp_path / "model.pte")
    tokens = tokens_for(97, CONTEXT)
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    # Without rounding: random layers of some families magnify that of fp16 beyond any bound.
    runner = ReferenceRunner(tmp_path / "model.pte", Execution(mode="fp32"))
    for seed in range(2):
        found = feed(runner, tokens, random_split(CONTEXT, LENGTHS, seed))
        errors = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert errors.max() < BOUND
