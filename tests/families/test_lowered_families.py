"""A model of every family, lowered for both targets, for one unquantized and at four bits for one.

Features are lowered in `tests/lower/test_lowered_options.py`, each once; here are whole families.
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
FORMATS: dict[str, dict[str, Any]] = {
    "unquantized": UNQUANTIZED,
    "4 bits": {"bits": 4, "group_size": 8},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("target", "label"), [("gpu", "unquantized"), ("ane", "4 bits")])
@pytest.mark.parametrize("family", TABLE)
def test_a_family_is_lowered(family: str, label: str, target: str, tmp_path: Path) -> None:
    *_, case = TABLE[family].cases.values()
    checkpoint(tmp_path, family, case)
    config = ExportConfig(
        context=CONTEXT, seq_lengths=LENGTHS, target=target, logits="all", **FORMATS[label]
    )
    artifact = lower(tmp_path, config, tmp_path / "model.pte")
    tokens = tokens_for(97, CONTEXT)
    expected = EagerRunner(artifact.decoder, "eager").logits(tokens)
    # Without rounding: random layers of some families magnify that of fp16 beyond any bound.
    runner = ReferenceRunner(tmp_path / "model.pte", Execution(mode="fp32"))
    for seed in range(2):
        found = feed(runner, tokens, random_split(CONTEXT, LENGTHS, seed))
        errors = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert errors.max() < BOUND
