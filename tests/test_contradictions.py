"""Each pair of settings that cannot be is refused: by its own sentence, for both of them."""

from __future__ import annotations

from typing import Any

import pytest

from llm_coreml.config import ExportConfig
from llm_coreml.config.contradictions import CONTRADICTIONS, check_together
from llm_coreml.config.values import SKIP_HEAD, SKIP_TABLE
from llm_coreml.targets import get_target

# The settings of each, in the order in which they stand there; all of them are needed.
EXAMPLES: tuple[dict[str, Any], ...] = (
    {"adapters": "beside", "rotate": "both"},
    {"adapters": "beside", "recover": "lora:4"},
    {"adapters": "beside", "size": 600_000_000},
    {"adapters": "beside", "pt2e": "weights"},
    {"skip_ops": (SKIP_TABLE,), "backend": "xnnpack"},
    {"skip_ops": (SKIP_TABLE,), "split": ("embedding",)},
    {"skip_ops": (SKIP_HEAD,), "split": ("head",)},
    {"skip_ops": (SKIP_HEAD,), "head": "topk:5"},
    {"skip_ops": (SKIP_HEAD,), "head_split": 64},
    {"skip_ops": (SKIP_TABLE,), "gather_split": 64},
    {"constants": "inputs", "backend": "xnnpack"},
    {"constants": "inputs", "pt2e": "weights"},
    {"constants": "inputs", "layout": "conv"},
    {"minimum_os": "iOS16", "functions": "prefill:8,decode:1"},
    {"minimum_os": "iOS16"},
    {"minimum_os": "iOS16", "linear_split": 64},
    {"functions": "prefill:8,decode:1", "kv_cache": "state"},
    {"functions": "prefill:8,decode:1", "seq_lengths": (1, 8)},
    {"functions": "prefill:8,decode:1", "backend": "xnnpack"},
    {"profile": "ane-ios26", "target": "gpu"},
    {"profile": "ane-ios18", "minimum_os": "iOS26"},
    {"backend": "xnnpack", "pad_heads": True},
    {"head": "topk:5", "backend": "xnnpack"},
    {"partition_size": 1000, "backend": "xnnpack"},
    {"split": ("head",), "backend": "xnnpack"},
    {"seq_lengths": "1..8", "target": "ane"},
    {"codes_of": "base", "adapters": "beside"},
    {"codes_of": "base", "pt2e": "weights"},
)
# What an example needs beside it, so that no other pair is refused first.
TUNED = {"tune": 5, "calibrate": "bundled"}
BESIDE: dict[int, dict[str, Any]] = {
    1: TUNED,
    15: {"kv_cache": "inputs"},
    20: {"target": "ane"},
}


def test_each_pair_has_an_example() -> None:
    assert len(EXAMPLES) == len(CONTRADICTIONS)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_a_pair_that_cannot_be_is_refused(number: int) -> None:
    each, settings, beside = CONTRADICTIONS[number], EXAMPLES[number], BESIDE.get(number, {})
    config = ExportConfig(**settings, **beside)
    with pytest.raises(each.error) as refused:
        check_together(config, get_target(config.target))
    told = str(refused.value)
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert flag in told or shown in told
    assert any(word in told for word in ("drop", "give", "use"))
    for left_out in settings:
        rest = {name: value for name, value in settings.items() if name != left_out}
        lighter = ExportConfig(**rest, **beside)
        # What follows from a default is still so.
        if getattr(lighter, left_out) != getattr(config, left_out):
            assert not each.holds(lighter, get_target(lighter.target)), left_out
